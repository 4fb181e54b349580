"""The example of docs/adding-a-method.md: added to a copy of the packages and used by every tool,
and registered from a module outside of them."""

import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from pretrain.checkpoint import format as checkpoint
from pretrain.methods import METHODS
from tests.pretrain import tiny
from tests.pretrain.ranks import on_ranks

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
CODE, RECIPE, LINE = (
    re.search(rf"```{kind}\n(.+?)```", PAGE, re.S)[1] for kind in ("python", "yaml", "text")
)
SMALL = (
    "MODEL.DEPTH 18 MODEL.WIDTH 0.0625 INPUT.CROP_SIZE 32 SOLVER.BATCH_SIZE 8 SOLVER.MAX_ITER 2 "
    "SOLVER.WARMUP_ITERS 1 LOG.PERIOD 1 DATALOADER.NUM_WORKERS 0 CHECKPOINT.PERIOD 1 "
    "MOCOV3.TEMPERATURE 0.5"
)
CHANCE = 4 * 0.5 * math.log(8)
USE = f"""
import shutil
from tools import convert, inspect_run, pretrain, report
run = ["--config", "moco-v3", "--data", "photos", "--output-dir"]
small = {SMALL.split()}
assert not pretrain.main(["--config", "moco-v3", "--explain", *small])
assert not pretrain.main(["--explain", "MOCOV3.TEMPERATURE"])
assert not pretrain.main(["--explain", "METHOD"])
assert not pretrain.main([*run, "run", "--show-views", "views.png", *small])
assert not pretrain.main([*run, "run", *small])
shutil.copytree("run", "broken", ignore=shutil.ignore_patterns("*.pth"))
shutil.copy("run/checkpoint_00000001.pth", "broken/checkpoint_last.pth")
assert not pretrain.main([*run, "broken", "--resume", *small])
assert not convert.main(["run/checkpoint_last.pth", "--to", "torchvision", "-o", "weights.pth"])
assert not inspect_run.main(["run", "--no-images"])
assert not report.main(["run", "-o", "report"])
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the packages with the page's file, recipe and line, and nothing else changed."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("moco_common", "pretrain", "moco_det", "configs", "tools"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    (root / "pretrain/methods/moco_v3.py").write_text(CODE)
    (root / "configs/pretrain/moco-v3.yaml").write_text(RECIPE)
    methods = root / "pretrain/methods/__init__.py"
    before, brace, after = methods.read_text().partition("METHODS = {")
    methods.write_text(f"{before}{brace}\n    {LINE.strip()}{after}")
    (root / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        image = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        cv2.imwrite(str(root / "photos" / f"{i}.png"), image)
    return root


def test_file_recipe_and_line_are_all_that_the_tools_need(copy):
    assert len(CODE.splitlines()) <= 100
    (copy / "use.py").write_text(USE)
    done = subprocess.run(
        [sys.executable, "use.py"], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "method moco-v3: MoCo v3 (Chen, Xie and He 2021" in said
    assert "* MOCOV3.TEMPERATURE 0.5 (recipe: 1.0): Temperature of the softmax, tau." in said
    assert "\n    1.0: moco-v3\n" in said
    assert "    moco-v3: MoCo v3 (Chen" in said
    assert f"(chance {CHANCE:.3f})" in said
    picture = cv2.imread(str(copy / "views.png"))
    from pretrain.visualization.contact_sheet import heading

    for column, name in enumerate(("view x1, 32 px", "view x2, 32 px"), 1):
        strip = picture[:20, 164 * column :][:, :160]
        assert (strip == heading(name, 160)[:, :160]).all()
    lines = [json.loads(line) for line in (copy / "run/metrics.json").open()]
    assert [line["iteration"] for line in lines] == [1, 2]
    assert [line["chance_loss"] for line in lines] == pytest.approx([CHANCE] * 2)
    state, again = (checkpoint.load(copy / name / checkpoint.LAST) for name in ("run", "broken"))
    assert state["state_dict"]["predictor.0.weight"].shape == (4096, 256)
    for name, value in state["state_dict"].items():
        assert torch.equal(again["state_dict"][name], value), name
    sections = {line.partition(":")[0] for line in state["config"].splitlines()}
    assert "MOCOV3" in sections
    assert not {"MOCO", "SWAV"} & sections
    (values,) = json.loads((copy / "report/report.json").read_text())["pretraining"]
    assert values["chance_loss"] == pytest.approx(CHANCE)
    assert (copy / "weights.pth").exists()


def register():
    """The example as a user's own module, outside of the repository."""
    folder = Path(tempfile.mkdtemp())
    (folder / "my_own_method.py").write_text(CODE)
    sys.path.insert(0, str(folder))
    METHODS["moco-v3"] = "my_own_method:MoCoV3"
    return folder


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(METHODS, "moco-v3", "")
    folder = register()
    yield
    sys.modules.pop("my_own_method", None)
    shutil.rmtree(folder)


def naive(q, k, temperature):
    """Algorithm 1's ``ctr``, one query at a time."""
    losses = []
    for i in range(len(q)):
        logits = torch.stack([q[i] @ key / temperature for key in k])
        losses.append(-(logits[i] - logits.exp().sum().log()))
    return 2 * temperature * sum(losses) / len(losses)


def test_a_method_of_a_users_own_module_is_built_and_its_loss_is_the_papers(registered):
    method, _ = tiny.build("moco-v3", "MOCOV3.TEMPERATURE", 0.4)
    views = tiny.views("moco-v3", 0)
    with torch.no_grad():
        for p in method.encoder_k.parameters():
            p.mul_(1.1)
    loss = method(views, 0, tiny.index(0))["loss"]
    q1, q2 = (
        torch.nn.functional.normalize(method.predictor(method.encoder_q(v)), dim=1) for v in views
    )
    k1, k2 = (torch.nn.functional.normalize(method.encoder_k(v), dim=1).detach() for v in views)
    expected = naive(q1, k2, 0.4) + naive(q2, k1, 0.4)
    torch.testing.assert_close(loss, expected)
    assert method.chance_loss == pytest.approx(4 * 0.4 * math.log(tiny.BATCH))
    trained = [p for p in method.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(x, trained) for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def steps_of_the_example():
    register()
    settings = (("MODEL.BN_GROUPS", 2), ("MODEL.SYNC_BN", True))
    return [tiny.steps("moco-v3", *overrides) for overrides in settings]


def test_two_processes_take_the_examples_steps_of_one():
    (alone,) = on_ranks(1, steps_of_the_example)
    for rank, results in enumerate(on_ranks(2, steps_of_the_example)):
        for result, expected in zip(results, alone, strict=True):
            wanted = expected if rank == 0 else expected | {"state": {}}
            torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-8)
