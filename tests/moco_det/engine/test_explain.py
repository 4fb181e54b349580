"""What is said of a run: source, deviations, their price; and of a key."""

import re

import pytest
from detectron2.config import get_cfg

from moco_common.errors import UserError, run_tool
from moco_det.config.defaults import default_config, flatten
from moco_det.config.key_descriptions import MEANINGS, OTHER, explanation, meaning
from moco_det.config.protocols import (
    HOUSEKEEPING,
    deviations,
    get_protocol,
    load_config,
    protocol_names,
)
from moco_det.engine.explain import _comment, explain_key
from tools.train_net import main, parse


def test_a_run_that_follows_its_protocol_says_so_and_names_its_source():
    said = explanation(get_protocol("VOC-supervised"))
    assert said[0].startswith("Protocol VOC, from weights trained on ImageNet's labels")
    assert "arXiv:1911.05722" in said[1]
    assert said[2:] == ["The run follows the protocol in every setting."]


def test_every_deviation_stands_in_exactly_one_sentence():
    overrides = ["SOLVER.IMS_PER_BATCH", "4", "INPUT.MIN_SIZE_TEST", "400", "SOLVER.GAMMA", "0.5"]
    overrides += ["MODEL.RPN.NMS_THRESH", "0.6", "DATASETS.LABEL_SHARE", "0.1", "SEED", "7"]
    cfg = load_config("VOC", overrides)
    text = "\n".join(explanation(cfg)[2:])
    for line in deviations(cfg):
        assert text.count(line) == 1
    assert "SEED" not in text


def test_a_schedule_that_follows_the_batch_is_told_from_one_that_does_not():
    """A quarter of the batch: a quarter of the learning rate, four times the iterations."""
    follows = ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.BASE_LR", "0.005", "SOLVER.MAX_ITER", "96000"]
    follows += ["SOLVER.STEPS", "(72000, 88000)"]
    (sentence,) = explanation(load_config("VOC", follows))[2:]
    assert sentence.endswith(meaning("SOLVER.IMS_PER_BATCH").changed)
    wrong = explanation(load_config("VOC", [*follows, "SOLVER.BASE_LR", "0.02"]))[2:]
    assert len(wrong) == 2
    halved = explanation(load_config("VOC", follows[:2]))[2:]
    assert [s.partition(":")[0] for s in halved] == ["SOLVER.IMS_PER_BATCH 16 -> 4"]
    short = explanation(load_config("VOC", ["SOLVER.MAX_ITER", "100"]))[2:]
    assert short[0].endswith(meaning("SOLVER.MAX_ITER").changed)


def test_every_key_of_a_protocol_has_a_meaning_and_the_most_exact_one():
    """No key that any protocol sets is left to the general sentence."""
    default = flatten(default_config())
    for name in protocol_names():
        resolved = flatten(get_protocol(name))
        for key in resolved:
            if resolved[key] != default[key] and key not in HOUSEKEEPING:
                assert meaning(key) is not OTHER, key
    assert meaning("SOLVER.BASE_LR") is not meaning("SOLVER.MOMENTUM")
    assert meaning("SOLVER.AMP.ENABLED").decides.startswith("Half precision")
    assert meaning("MODEL.RPN.NMS_THRESH").decides.startswith("The proposals")
    assert meaning("MODEL.LOAD_PROPOSALS").decides == "The network."
    assert meaning("GLOBAL.HACK") is OTHER
    known = set(default)
    for group in MEANINGS:
        for pattern in group.keys:
            assert any(re.fullmatch(pattern.replace("*", ".*"), key) for key in known), pattern


def test_without_a_protocol_there_is_nothing_to_explain(tmp_path):
    (tmp_path / "own.yaml").write_text("SOLVER:\n  MAX_ITER: 3\n")
    assert explanation(load_config(str(tmp_path / "own.yaml"))) == []


def test_a_key_is_explained_with_default_values_and_sources():
    said = explain_key("MODEL.RESNETS.STRIDE_IN_1X1")
    assert "Place the stride 2 conv on the 1x1 filter" in said  # Detectron2's own words
    assert "default: True" in said
    of_false, _, of_true = said.partition("    True: ")
    assert re.search(r"False: .*\bVOC,", of_false, flags=re.DOTALL)
    assert "VOC-supervised" in of_true
    assert "Source" not in explain_key("MODEL.RPN.NMS_THRESH")
    ours = explain_key("DATASETS.LABEL_SHARE")
    assert "Share of the training images that is used" in ours
    assert "0.01: COCO-FPN-12k-1pct, VOC-1pct" in ours
    assert "VOC-1pct: unpublished preview of this project" in ours
    with pytest.raises(UserError, match=r"'SOLVER.MAX_ITR' .*SOLVER.MAX_ITER"):
        explain_key("SOLVER.MAX_ITR")


@pytest.mark.parametrize(
    "key", sorted(flatten(default_config()).keys() - flatten(get_cfg()).keys())
)
def test_every_key_of_this_project_is_described(key):
    assert _comment(key)


def test_explain_prints_the_run_and_starts_nothing(tmp_path, monkeypatch, capsys):
    """Neither weights nor data need be there."""
    monkeypatch.chdir(tmp_path)
    args = ["--config", "VOC", "--output-dir", "run", "--explain"]
    assert main([*args, "SOLVER.IMS_PER_BATCH", "4"]) == 0
    said = capsys.readouterr().out
    for expected in (
        "protocol VOC",
        "MODEL.BACKBONE.FREEZE_AT 2 -> 0",
        "Source: He et al. 2020",
        "SOLVER.IMS_PER_BATCH 16 -> 4",
        "SOLVER.MAX_ITER 24000 -> 96000",
        "as many images are seen",
    ):
        assert expected in " ".join(said.split())
    assert list(tmp_path.iterdir()) == []
    assert main(["--explain", "SOLVER.BASE_LR"]) == 0
    assert "in the protocols:" in capsys.readouterr().out
    assert main(["--config", "VOC-random", "--explain", "MODEL.WEIGHTS", "x.pkl"]) == 1
    assert "the weights file x.pkl does not exist" in capsys.readouterr().err


def test_a_key_after_explain_is_told_from_an_override():
    assert parse(["--explain", "SOLVER.BASE_LR"]).explain == "SOLVER.BASE_LR"
    args = parse(["--config", "VOC", "--explain", "SOLVER.BASE_LR", "0.1", "SEED", "2"])
    assert (args.explain, args.overrides) == ("", ["SOLVER.BASE_LR", "0.1", "SEED", "2"])
    assert parse(["--config", "VOC"]).explain is None


def test_a_tool_exits_with_one_line_for_a_mistake_and_keeps_other_tracebacks(capsys):
    def fail(error):
        raise error

    assert run_tool(lambda: None) == 0
    assert run_tool(lambda: 3) == 3
    assert run_tool(lambda: fail(UserError("no such file."))) == 1
    assert capsys.readouterr().err == "error: no such file.\n"
    assert run_tool(lambda: fail(KeyboardInterrupt()), interrupted="go on") == 130
    assert capsys.readouterr().err == "go on\n"
    with pytest.raises(ZeroDivisionError):
        run_tool(lambda: 1 // 0)
