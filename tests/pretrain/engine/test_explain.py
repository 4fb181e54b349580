"""What ``--explain`` says of a recipe and of a key."""

import pytest

from moco_common.errors import UserError
from pretrain.config.defaults import all_keys, recipe_names
from pretrain.engine.explain import explain_key, recipe_source
from pretrain.engine.resume import FIXED
from pretrain.methods import METHODS
from tools.pretrain import main


def test_every_key_says_what_it_does_and_every_recipe_whence_it_is():
    for key, (_, description) in all_keys().items():
        assert len(description.split()) >= 3, key
        assert description[0].isupper(), key
        assert description.endswith("."), key
        assert not description.lower().startswith(("of ", "how ")), key
    assert not [name for name in recipe_names() if recipe_source(name) == "not stated."]


def test_a_key_is_told_with_default_recipes_reasons_and_sources():
    told = " ".join(explain_key("MOCO.MOMENTUM").split())
    assert "an average over some 1 / (1 - m) steps" in told
    assert "default: 0.999 " in told
    assert "0.98: scenes, small-data" in told
    assert "moco-v1: MoCo v1 on ImageNet-1M (He et al. 2020, Section 4)" in told
    assert "MOCO.MOMENTUM: Section 3.2" in told
    assert "end-to-end" in told  # which reads MoCo's keys
    assert "byol" not in told  # which has no use for it
    assert told.endswith("on --resume: cannot be changed")
    assert "of --data" not in explain_key("SOLVER.EPOCHS")
    assert "on --resume: can be changed; the change is logged" in explain_key("SOLVER.EPOCHS")
    assert FIXED[0] in explain_key(FIXED[0])
    with pytest.raises(UserError, match=r"did you mean SOLVER\.BATCH_SIZE"):
        explain_key("SOLVER.BATCH_SZIE")


def test_a_run_is_told_with_what_the_command_line_changes_and_nothing_starts(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["--config", "moco-v2", "--explain", "SOLVER.BATCH_SIZE", "64"]) == 0
    told = capsys.readouterr().out
    assert "recipe moco-v2: MoCo v2 (Chen et al. 2020, Section 3)" in told
    assert "method moco: Momentum Contrast (He et al. 2020" in told
    assert "* SOLVER.BATCH_SIZE 64 (recipe: 256)" in told
    assert "* SOLVER.BASE_LR 0.0075 (recipe: 0.03)" in told
    assert "SOLVER.BASE_LR was scaled with SOLVER.BATCH_SIZE" in told
    assert "  MOCO.MLP True: " in told
    assert "MOCO.QUEUE_SIZE" not in told  # as the default has it
    assert main(["--config", "moco-v2", "--explain"]) == 0
    assert "\n* " not in capsys.readouterr().out
    assert main(["--explain", "SOLVER.BASE_LR"]) == 0
    assert "  recipes:" in capsys.readouterr().out
    assert main(["--explain", "METHOD"]) == 0
    told = capsys.readouterr().out
    assert all(f"    {name}: " in told for name in METHODS)
    assert main(["--explain"]) == 1
    assert "--config is missing: give a recipe" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
