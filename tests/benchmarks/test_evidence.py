"""The evidence's machinery: what is run, what is not run again, what the page may say."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.evidence import cell as evidence_cell
from benchmarks.evidence import document as evidence_document
from benchmarks.evidence import jobs
from benchmarks.evidence import leak as evidence_leak
from benchmarks.evidence import run as evidence
from benchmarks.evidence.document import (
    Measured,
    best_sentence,
    expectation_table,
    table,
    verdict,
    write_document,
)
from benchmarks.evidence.figures import BATCH, STEPS, WARMUP, figures
from benchmarks.evidence.terms import METRICS, Cell, Expectation, Figure
from pretrain.probe.datasets import open_labelled, open_train_and_test
from tests.pretrain.probe_data import write_classes

HOW = {"pool": "a.txt", "train": "a", "test": None, "holdout": 0.2, "probe_size": 32}


def measured(**values):
    """A figure whose cells a, b, ... have these kNN accuracies, one a seed."""
    cells = [Cell(label, {}, series="") for label in values]
    figure = Figure("tiny", "A title", "About.", cells, ("knn",), [Expectation("b wins", "b", "a")])
    return Measured(figure, {k: [{"knn": v} for v in vs] for k, vs in values.items()})


def test_a_difference_is_called_one_only_by_its_interval():
    low, high = [50.0, 50.2, 49.8], [52.0, 52.2, 51.8]
    assert verdict(high, low) == ("yes", "+2.0 [+1.5, +2.5]")  # 2.776 * sqrt(2 * 0.04 / 3)
    assert verdict(low, high)[0] == "no, the opposite"
    assert verdict([50.0, 54.0, 46.0], low)[0] == "not significant"
    assert verdict([50.0], [1.0]) == ("no interval (n = 1)", "+49.0")
    assert verdict([50.0, 50.0], [50.0, 50.0])[0] == "not significant"


def test_the_sentence_about_the_best_cell_follows_the_data():
    part = measured(a=[50.0, 50.2, 49.8], b=[52.0, 52.2, 51.8], c=[51.0, 53.0, 50.9])
    assert best_sentence(part, "knn") == (
        "The highest mean is that of b (52.0 ± 0.2); it is significantly above a; "
        "it is not significantly above c."
    )
    part = measured(a=[53.0, 53.2, 52.8], b=[52.0, 52.2, 51.8])
    assert best_sentence(part, "knn") == (
        "The highest mean is that of a (53.0 ± 0.2); it is significantly above b."
    )
    assert best_sentence(measured(a=[1.0]), "knn") == ""


def test_several_cells_are_averaged_within_the_seeds_that_all_of_them_have():
    results = {
        "a": [{"seed": 0, "knn": 1.0}, {"seed": 1, "knn": 2.0}, {"seed": 2, "knn": 9.0}],
        "b": [{"seed": 1, "knn": 6.0}, {"seed": 0, "knn": 3.0}],
        "c": [{"seed": seed, "knn": 10.0 + 3 * seed} for seed in range(3)],
    }
    e = Expectation("c wins", "c", ("a", "b"))
    figure = Figure("f", "A title", "About.", [Cell(x) for x in results], ("knn",), [e])
    part = Measured(figure, results)
    assert part.means(("a", "b"), "knn") == [2.0, 4.0]  # seeds 0 and 1, in either's order
    row = expectation_table(part).splitlines()[2]
    assert row.startswith("| c wins: c above the mean of a and b | kNN top-1 (%) | +10.0 [")


def test_remarks_survive_and_the_rest_is_made_anew(tmp_path):
    page = tmp_path / "evidence.md"
    write_document([measured(a=[1.0, 2.0], b=[5.0, 5.5])], page, {"seeds": "2"})
    text = page.read_text()
    assert "| a | 2 | 1.5 ± 0.7 |" in text
    assert (tmp_path / "evidence" / "tiny.png").read_bytes().startswith(b"\x89PNG")
    mark = next(line for line in text.splitlines() if line.startswith("<!-- remarks: tiny"))
    page.write_text(text.replace(mark, f"{mark}\nSeen by eye: **nothing**.\n"))
    write_document([measured(a=[3.0, 4.0], b=[5.0, 5.5])], page, {"seeds": "2"})
    again = page.read_text()
    assert "Seen by eye: **nothing**." in again
    assert "| a | 2 | 3.5 ± 0.7 |" in again
    assert "1.5 ± 0.7" not in again
    write_document([measured(a=[3.0, 4.0], b=[5.0, 5.5])], page, {"seeds": "2"})
    assert page.read_text() == again


def test_a_table_leaves_out_what_was_not_measured():
    part = measured(a=[1.0], b=[])
    assert table(part).splitlines() == [
        f"| | n | {METRICS['knn']} |",
        "|---|---|---|",
        "| a | 1 | 1.0 |",
    ]


def test_every_figure_names_cells_and_metrics_that_are_there():
    for figure in figures():
        labels = [cell.label for cell in figure.cells]
        assert len(labels) == len(set(labels))
        assert set(figure.metrics) <= set(METRICS)
        for e in figure.expectations:
            assert {label for side in e.sides for label in side} <= set(labels), e
            assert e.metric in figure.metrics
        for cell in figure.cells:
            evidence_cell.config(dict(cell.overrides), seed=0)  # no unknown key


@pytest.mark.parametrize("steps", [400, 37])
def test_all_cells_see_as_many_images(steps):
    base = evidence_cell.config({}, seed=0).SOLVER
    assert (base.MAX_ITER, base.BATCH_SIZE, base.WARMUP_ITERS) == (STEPS, BATCH, WARMUP)
    for figure in figures(steps):
        for cell in figure.cells:
            solver = evidence_cell.config(dict(cell.overrides), seed=0).SOLVER
            if figure.name in ("leak", "scenes"):  # tasks of their own
                continue
            assert abs(solver.MAX_ITER * solver.BATCH_SIZE - 64 * steps) < solver.BATCH_SIZE
            if figure.name != "plateau":  # which changes the rate itself
                assert pytest.approx(base.BASE_LR / 64) == solver.BASE_LR / solver.BATCH_SIZE
            assert solver.WARMUP_ITERS < 0.15 * solver.MAX_ITER + 1


def test_equal_cells_of_different_figures_share_a_folder_and_others_do_not(tmp_path):
    def folder(cell, seed=0, **how):
        return evidence.cell_folder(tmp_path, cell, seed, {**HOW, **how})

    base = folder(Cell("MoCo"))
    assert folder(Cell("K 512", {"MOCO.QUEUE_SIZE": 512})) == base
    others = [
        folder(Cell("m 0.9", {"MOCO.MOMENTUM": 0.9})),
        folder(Cell("MoCo"), seed=1),
        folder(Cell("MoCo"), train="b"),
        folder(Cell("MoCo"), probe_size=64),
        folder(Cell("random weights", trained=False)),
    ]
    assert len({base, *others}) == 6


def test_a_pool_is_of_every_class_and_without_a_test_image(tmp_path):
    data = write_classes(tmp_path / "train", 20)
    train, test = open_train_and_test(str(data))  # 16 and 4 of each class
    path = evidence.write_pool(train, 24, tmp_path / "out")
    names = Path(path).read_text().splitlines()
    assert path.endswith("pool-24.txt")
    assert Counter(Path(name).parent.name for name in names) == dict.fromkeys(train.classes, 8)
    assert not set(names) & {test.name(i) for i in range(len(test))}
    assert evidence.write_pool(train, 10**6, tmp_path / "out").endswith("pool-48.txt")


def test_finished_jobs_are_not_repeated_and_failures_are_named_without_stopping_the_rest(
    tmp_path, capsys
):
    def job(name, code):
        (tmp_path / name).mkdir()
        done = tmp_path / name / "result.json"
        script = f"from pathlib import Path; p = Path({str(done)!r}); {code}"
        return jobs.Job(name, tmp_path / name, [[sys.executable, "-c", script]], done)

    todo = [
        job("good", "p.write_text(str(int(p.exists())))"),
        job("bad", "raise SystemExit('out of luck')"),
        job("silent", "pass"),  # ends well and leaves nothing
    ]
    for _ in range(2):
        failures = jobs.run_jobs(todo, 2, "cells")
        assert len(failures) == 2
        assert "out of luck" in " ".join(failures)
    assert (tmp_path / "good" / "result.json").read_text() == "0"
    said = capsys.readouterr().out
    assert "cells: 3 in total, 0 already done" in said
    assert "cells: 3 in total, 1 already done" in said
    assert "3/3" in said


def test_a_cell_trains_probes_and_writes_what_the_page_needs(tmp_path):
    data = write_classes(tmp_path / "train", 12)
    tiny = {
        "MODEL.DEPTH": 18,
        "MODEL.WIDTH": 0.0625,
        "MOCO.QUEUE_SIZE": 16,
        "MOCO.DIM": 8,
        "SOLVER.BATCH_SIZE": 8,
        "SOLVER.MAX_ITER": 10,
        "INPUT.CROP_SIZE": 32,
        "LOG.PERIOD": 1,
    }
    pool = evidence.write_pool(open_labelled(str(data)), 12, tmp_path)
    for trained in (True, False):
        folder = tmp_path / f"cell-{trained}"
        how = {**HOW, "train": str(data), "pool": pool}
        evidence.cell_job(folder, Cell("tiny", tiny, trained=trained), 0, how)
        result = evidence_cell.run(folder)
        assert 0 <= result["knn"] <= 100
        assert result["images"] == [30, 6]  # a fifth of 12 held out of each class
        assert (folder / "run" / "checkpoint_last.pth").exists()
        assert ("loss" in result) == trained
        if trained:
            lines = (folder / "run" / "metrics.json").read_text().splitlines()
            last = [json.loads(line)["loss"] for line in lines][8:]
            assert result["loss"] == pytest.approx(sum(last) / 2)
            assert 0 <= result["rss"] < 20_000  # MB


def test_a_detector_starts_from_its_cell_or_from_random_weights_in_the_same_network(tmp_path):
    every = {figure.name: figure for figure in figures()}
    args = evidence.parser().parse_args(
        "--data d --detection voc:a:trainval voc:a:test --detection-iterations 7 "
        "--detection-share 0.2".split()
    )
    assert evidence.detectors_of(every["momentum"], args, tmp_path) is None
    scenes = evidence.detectors_of(every["scenes"], args, tmp_path)
    assert (scenes.protocol, scenes.train) == ("scenes", f"voc:{tmp_path}/voc:train")
    figure, detectors = every["methods"], evidence.detectors_of(every["methods"], args, tmp_path)
    random, moco = (cell.label for cell in figure.cells[:2])
    folders = {(random, 0): tmp_path / "r", (moco, 2): tmp_path / "m"}
    assert not detectors.jobs(figure, folders)  # nothing has been trained
    for folder in folders.values():
        folder.mkdir()
        (folder / "result.json").write_text('{"knn": 1.0}')
    found = detectors.jobs(figure, folders)
    for job, protocol, key in zip(
        found, ("VOC-random", "VOC"), ("MODEL.ARCHITECTURE_FROM", "MODEL.WEIGHTS"), strict=True
    ):
        convert, train = (" ".join(command) for command in job.commands)
        weights = job.folder / "weights.pkl"
        assert convert.endswith(f"convert.py {job.folder}/run/checkpoint_last.pth -o {weights}")
        assert f"--config {protocol} " in train
        assert "--train-data voc:a:trainval --test-data voc:a:test " in train
        assert f"{key} {weights} SEED {2 * (job.folder.name == 'm')} SOLVER.MAX_ITER 7 " in train
        assert "DATASETS.LABEL_SHARE 0.2 " in train
        assert job.done == job.folder / "detection-7-share-0.2" / "results.json"
    found[0].done.parent.mkdir()
    found[0].done.write_text('{"bbox": {"AP": 5.0, "AP50": 9.0}}')
    known = {"seed": 2, "knn": 1.0}
    assert evidence.measurements(folders, detectors) == {
        random: [{"seed": 0, "knn": 1.0, "AP": 5.0, "AP50": 9.0}],
        moco: [known],
    }
    assert evidence.measurements(folders, None)[random] == [{"seed": 0, "knn": 1.0}]


def test_the_company_is_counted_as_its_words_say():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 12, 3, generator=generator)
    found = 0
    for i in range(12):
        others = []
        for j in range(12):
            first = j // 4 * 4  # key j is of the image before it in the group of four
            source = j - 1 if j > first else first + 3
            if source != i:
                others.append((float(q[i] @ k[j]), j // 4))
        found += max(others)[1] == i // 4
    assert 0 < found < 12
    assert evidence_leak.from_company(q, k, 3) == pytest.approx(found / 12)


def test_the_leaks_cell_measures_a_run_whose_keys_are_of_other_images(tmp_path):
    data = write_classes(tmp_path / "train", 8)
    pool = evidence.write_pool(open_labelled(str(data)), 24, tmp_path)
    cells = next(f for f in figures(4) if f.name == "leak").cells  # 50 steps
    for cell in cells:
        tiny = {**cell.overrides, "MODEL.WIDTH": 0.0625, "SOLVER.WARMUP_ITERS": 2}
        small = Cell(cell.label, tiny, script=cell.script)
        job = evidence.cell_job(tmp_path / cell.label, small, 0, {**HOW, "pool": pool})
        assert job.commands[0][1].endswith("evidence/leak.py")
        result = evidence_leak.run(job.folder)
        assert 0 <= result["company"] <= 100
        assert len(result["curve"]) == 10
        assert np.isfinite(result["loss"])


def test_a_curve_is_drawn_of_every_seed():
    figure = next(figure for figure in figures() if figure.curve)
    results = {c.label: [{"curve": [1.0, 2.0]}, {"curve": [2.0, 5.0]}] for c in figure.cells}
    (axis,) = evidence_document.plot(Measured(figure, results)).axes
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]
    assert drawn == 2 * [([25.0, 75.0], [1.0, 2.0]), ([25.0, 75.0], [2.0, 5.0])]
    assert axis.get_ylim()[0] == 0


def test_a_page_is_written_from_what_has_been_run_so_far(tmp_path, capsys):
    data = write_classes(tmp_path / "train", 5)
    words = ["--data", str(data), "--output", str(tmp_path / "runs"), "--seeds", "2"]
    words += ["--document", str(tmp_path / "page.md"), "--document-only"]
    assert evidence.main(words) == 0
    assert "## " not in (tmp_path / "page.md").read_text()
    pool = str(tmp_path / "runs" / "pool-12.txt")  # all but the fifth that is held out
    how = {"pool": pool, "train": str(data), "test": None, "holdout": 0.2, "probe_size": 64}
    for seed in range(2):
        folder = evidence.cell_folder(tmp_path / "runs", Cell("MoCo"), seed, how)
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"knn": 50.0 + seed, "linear": 60.0}))
    assert evidence.main(words) == 0
    text = (tmp_path / "page.md").read_text()
    assert "| MoCo | 2 | 50.5 ± 0.7 | 60.0 ± 0.0 |" in text
    assert "| MoCo, K 512 | 2 | 50.5 ± 0.7 | 60.0 ± 0.0 |" in text
    assert evidence.main(["--data", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.count("error:") == 1
