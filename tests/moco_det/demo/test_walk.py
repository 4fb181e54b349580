"""The demo at a size of seconds: every station runs, and a second walk repeats none."""

import json
from pathlib import Path

import pytest

from moco_common.errors import UserError
from moco_det.demo.walk import Demo

TOOLS = Path(__file__).parents[3] / "tools"
SHORT_PRETRAINING = (
    "SOLVER.MAX_ITER 4 SOLVER.BATCH_SIZE 8 LOG.PERIOD 2 MOCO.QUEUE_SIZE 32 MODEL.WIDTH 0.0625 "
    "INPUT.CROP_SIZE 32 DATALOADER.NUM_WORKERS 0"
).split()
SHORT_FINE_TUNING = "SOLVER.MAX_ITER 3 TEST.PRECISE_BN.NUM_ITER 2 LOG_PERIOD 1".split()


def short_demo(folder: Path) -> Demo:
    return Demo(
        folder,
        tools=TOOLS,
        scenes={"unlabelled": 16, "train": 8, "test": 4},
        pretraining=SHORT_PRETRAINING,
        fine_tuning=SHORT_FINE_TUNING,
    )


@pytest.mark.timeout(900)  # many processes, on a machine that may be busy
def test_the_demo_walks_the_whole_road_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    short_demo(tmp_path).run()
    out = capfd.readouterr().out
    for word in ("random", "moco", "AP50", "holds", "done in"):
        assert word in out
    names = {path.name for path in tmp_path.iterdir()}
    assert {"pretrain-moco", "moco.pkl", "detect-moco", "detect-random"} <= names
    for picture in ("pretraining.png", "fine-tuning.png", "detections.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    for part in ("Precision over recall", "Confusion of classes", "Largest difference in F1"):
        assert part in page
    results = {
        name: json.loads((tmp_path / name / "results.json").read_text())
        for name in ("detect-moco", "detect-random")
    }
    configs = {name: (tmp_path / name / "config.yaml").read_text() for name in results}
    different = set(configs["detect-moco"].splitlines()) ^ set(
        configs["detect-random"].splitlines()
    )
    keys = {line.split(":")[0].strip() for line in different}
    assert keys == {"WEIGHTS", "ARCHITECTURE_FROM", "OUTPUT_DIR", "PROTOCOL"}
    assert results["detect-moco"]["iteration"] == results["detect-random"]["iteration"] == 3
    before = (tmp_path / "detect-moco" / "metrics.json").read_bytes()
    short_demo(tmp_path).run()
    assert (tmp_path / "detect-moco" / "metrics.json").read_bytes() == before


def test_a_station_that_fails_stops_the_demo_with_its_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    demo = Demo(tmp_path, tools=TOOLS, scenes={"unlabelled": 4, "train": 2, "test": 2})
    with pytest.raises(UserError, match="pretrain.py ended with status 1"):
        Demo(demo.folder, TOOLS, scenes=demo.scenes, pretraining=["SOLVER.BATHC_SIZE", "8"]).run()
    assert "did you mean SOLVER.BATCH_SIZE" in capfd.readouterr().out


@pytest.mark.parametrize("quiet", [True, False])
def test_a_quiet_demo_prints_its_tools_warnings_alone_and_on_standard_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], quiet: bool
) -> None:
    (tmp_path / "tool.py").write_text(
        "import sys; print('warning: mind this', file=sys.stderr)\n"
        "if '--quiet' not in sys.argv: print('hello')"
    )
    demo = Demo(tmp_path, tools=tmp_path, quiet=quiet)
    demo.head("1/1  try")
    demo.tools_side_by_side({"a": ["tool.py"], "bc": ["tool.py", "--seed", "1"]})
    out, err = capfd.readouterr()
    warnings = ["  a   warning: mind this", "  bc  warning: mind this"]
    if quiet:
        assert (out, sorted(err.splitlines())) == ("", warnings)
    else:
        assert err == ""
        assert {*warnings, "  a   hello", "  bc  hello", "1/1  try"} < set(out.splitlines())
