"""Reports of synthetic run directories: grouping, tables, the page, and what is broken."""

import json
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from moco_common.files import replace_file, replace_text
from moco_det.config.protocols import get_protocol
from moco_det.report.build import build_report
from moco_det.report.groups import group_runs
from moco_det.report.published import TABLE, published
from moco_det.report.runs import read_run, read_runs, strip_trial
from tests.moco_det.report_cases import two_groups, write_pretraining, write_run
from tools.report import main


def labels(paths):
    groups, notes = group_runs(read_runs(paths))
    return {group.label: [run.path.name for run in group.runs] for group in groups}, notes


@pytest.mark.parametrize(
    ("path", "seed", "label"),
    [
        ("out/moco-seed0", None, "moco"),
        ("out/moco_seed_12", 12, "moco"),
        ("out/moco.trial3", None, "moco"),
        ("out/moco_0", 0, "moco"),
        ("out/moco-02", 2, "moco"),
        ("out/resnet_50", 0, "resnet_50"),  # a bare number that is not the seed is a name
        ("out/resnet_50", None, "resnet_50"),
        ("out/bccd/trial_0", 5, "bccd"),
        ("out/bccd-seed1/trial_0", 1, "bccd"),
        ("out/retrial", None, "retrial"),
        ("out/prerun7", None, "prerun7"),
    ],
)
def test_labels_lose_the_seed_and_nothing_else(path, seed, label):
    assert strip_trial(path, seed) == label


def test_groups_are_those_of_a_naive_loop(tmp_path):
    paths = two_groups(tmp_path)
    expected = {}
    for path in paths:
        results = json.loads((path / "results.json").read_text())
        expected.setdefault(bool(results["weights"]), []).append(path.name)
    found, notes = labels(paths)
    assert sorted(found.values()) == sorted(expected.values())
    assert notes == []


def test_trials_inside_a_run_directory_are_found_in_order(tmp_path):
    for trial in (10, 2, 0):
        write_run(tmp_path / "voc" / f"trial_{trial}", 40 + trial, seed=trial)
    (tmp_path / "voc" / "trial_notes").mkdir()
    assert labels([tmp_path / "voc"])[0] == {"voc": ["trial_0", "trial_2", "trial_10"]}


def test_a_directory_named_twice_counts_once(tmp_path):
    write_run(tmp_path / "a")
    assert len(read_runs([tmp_path / "a", tmp_path / "a" / ".." / "a", tmp_path / "a"])) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"MAX_ITER": 99}},
        {"iteration": 7},
        {"weights": ""},
        {"deviations": ["SOLVER.MAX_ITER 1 -> 2"]},
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(tmp_path, change):
    write_run(tmp_path / "x-seed0", 40, 0)
    write_run(tmp_path / "x-seed1", 41, 1, **change)
    found, _ = labels(sorted(tmp_path.iterdir()))
    assert len(found) == 2  # two groups, under two names


def test_weights_pretrained_by_seed_are_one_group(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"x-seed{seed}", 40 + seed, seed, weights=f"pre-seed{seed}/out.pkl")
    assert len(labels(sorted(tmp_path.iterdir()))[0]["x"]) == 2


def test_a_copied_run_does_not_feign_a_spread(tmp_path):
    write_run(tmp_path / "x-seed0", 40, 0)
    write_run(tmp_path / "x-trial1", 40, 0)
    write_run(tmp_path / "x-trial2", 42, 0)  # the same seed, but not the same run
    found, notes = labels(sorted(tmp_path.iterdir()))
    assert found == {"x": ["x-seed0", "x-trial2"]}
    assert "left out" in notes[0]
    assert "both are counted" in notes[1]


def test_resumed_metrics_keep_the_newer_record_of_an_iteration(tmp_path):
    write_run(tmp_path / "x")
    records = [(1, 9.0), (2, 8.0), (3, 7.0), (2, 5.0), (4, 4.0)]
    lines = [json.dumps({"iteration": i, "loss": v}) for i, v in records]
    (tmp_path / "x" / "metrics.json").write_text("\n".join([*lines, '{"iteration": 5, "lo']))
    run = read_run(tmp_path / "x")
    assert run.series("loss") == ([1, 2, 4], [9.0, 5.0, 4.0])
    assert "line 6" in run.problems[0]


def test_evaluation_scalars_join_the_record_of_their_iteration(tmp_path):
    write_run(tmp_path / "x")
    lines = ['{"iteration": 3, "loss": 7}', '{"iteration": 3, "bbox/AP": 20}']
    (tmp_path / "x" / "metrics.json").write_text("\n".join(lines))
    assert read_run(tmp_path / "x").records == [{"iteration": 3, "loss": 7, "bbox/AP": 20}]


def test_table_shows_mean_and_sample_deviation(tmp_path):
    text = build_report(read_runs(two_groups(tmp_path))).text()
    values = [55 + 0.3 * seed for seed in range(3)]
    expected = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    row = next(line for line in text.splitlines() if line.startswith("| moco "))
    assert [cell.strip() for cell in row.split("|")[1:4]] == ["moco", "3", expected]


def test_tables_are_aligned(tmp_path):
    text = build_report(read_runs(two_groups(tmp_path))).text()
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if lines and lines[0].startswith("|"):
            assert len({len(line) for line in lines}) == 1


def test_the_baseline_is_subtracted_whatever_the_order(tmp_path):
    paths = two_groups(tmp_path)
    for order in (paths, paths[::-1]):
        (table,) = build_report(read_runs(order)).tables
        (pair,) = table.comparisons
        assert (pair.a, pair.b) == ("moco", "random")
        assert pair.metrics["bbox/AP"].mean == pytest.approx(55.3 - 33.5)


def test_a_single_run_gets_no_interval_and_the_report_says_so(tmp_path):
    write_run(tmp_path / "moco", 50)
    write_run(tmp_path / "random", 40, weights="")
    text = build_report(read_runs(sorted(tmp_path.iterdir()))).text()
    assert "moco minus random: AP +10.0, AP50 +10.0, AP75 +10.0; no interval" in text
    assert "n = 1" in text


def test_comparison_names_what_else_differs(tmp_path):
    write_run(tmp_path / "moco", 50)
    write_run(tmp_path / "random", 40, weights="", config={"BASE_LR": 0.1})
    text = build_report(read_runs(sorted(tmp_path.iterdir()))).text()
    assert "They also differ in SOLVER.BASE_LR." in text


def test_mask_ap_appears_where_there_is_any(tmp_path):
    write_run(tmp_path / "m", dataset="cells", segm={"AP": 12.34})
    write_run(tmp_path / "b", dataset="cells", weights="")
    (table,) = build_report(read_runs(sorted(tmp_path.iterdir()))).tables
    head, rows = table.rows({"segm/AP": "mask AP"})
    assert head[-1] == "mask AP"
    assert {row[0]: row[-1] for row in rows} == {"m": "12.3", "b": "-"}


def test_results_on_another_test_set_have_a_table_of_their_own(tmp_path):
    for seed in (0, 1):
        run = write_run(tmp_path / f"moco-seed{seed}", 50.0 + seed, seed)
        other = write_run(run / "test-own-1", 70.0 + seed, seed, dataset="voc:own:test")
        for name in ("config.yaml", "metrics.json"):
            (other / name).unlink()
    report = build_report(read_runs(sorted(tmp_path.iterdir())))
    found = {t.dataset: [(g.label, g.values("bbox/AP")) for g in t.groups] for t in report.tables}
    assert found == {
        "voc_2007_test": [("moco", [50.0, 51.0])],
        "voc:own:test": [("moco", [70.0, 71.0])],
    }
    assert report.notes == []


def test_published_numbers_stand_below_a_run_of_the_very_protocol(tmp_path):
    write_run(tmp_path / "mine", protocol="VOC")
    text = build_report(read_runs([tmp_path / "mine"])).text()
    assert "published: MoCo v2, 200 epochs" in text
    assert "57.0" in text
    assert text.index("| mine") < text.index("published:")


@pytest.mark.parametrize(
    "change",
    [{"deviations": ["SOLVER.MAX_ITER 24000 -> 400"]}, {"deviations": None}, {"dataset": "own"}],
)
def test_published_numbers_do_not_stand_beside_a_deviating_run(tmp_path, change):
    write_run(tmp_path / "mine", **change)
    report = build_report(read_runs([tmp_path / "mine"]))
    assert "published:" not in report.text()
    if "dataset" not in change:
        assert "not comparable" in report.text()


def test_published_numbers_do_not_stand_beside_another_network(tmp_path):
    write_run(tmp_path / "mine")
    config = {"MODEL": {"RESNETS": {"DEPTH": 18, "RES2_OUT_CHANNELS": 64}}}
    (tmp_path / "mine" / "config.yaml").write_text(yaml.safe_dump(config))
    assert "published:" not in build_report(read_runs([tmp_path / "mine"])).text()


def test_published_rows_are_complete_and_have_sources():
    for row in TABLE:
        assert row.source
        assert row.metrics.keys() & {"bbox/AP", "segm/AP", "keypoints/AP", "sem_seg/mIoU"}
        assert row.dataset in get_protocol(row.protocol).DATASETS.TEST
        assert row in published(f"{row.protocol}-random", row.dataset)  # siblings share them
        assert published(row.protocol, "other") == []


def test_published_differences_are_those_that_the_paper_tells_in_words():
    """He et al. 2020, sections 4.2.1 to 4.2.3 and A.4: gains over the supervised weights."""

    def gain(protocol, weights, metric):
        rows = {r.weights: r.metrics for r in TABLE if r.protocol == protocol}
        return round(rows[weights][metric] - rows["supervised, ImageNet"][metric], 1)

    moco, instagram = "MoCo v1, 200 epochs", "MoCo v1, Instagram-1B"
    boxes = ("bbox/AP50", "bbox/AP", "bbox/AP75")
    assert [gain("VOC", instagram, m) for m in boxes] == [0.9, 3.7, 4.9]
    assert [gain("VOC07", instagram, m) for m in boxes[1:]] == [5.2, 9.0]
    for protocol in ("COCO-C4-2x", "COCO-FPN-2x"):  # better in all metrics
        assert (
            min(gain(protocol, w, f"{t}/AP") for w in (moco, instagram) for t in ("bbox", "segm"))
            > 0
        )
    assert gain("COCO-FPN-2x", instagram, "bbox/AP") == 0.5
    assert gain("COCO-keypoints-2x", moco, "keypoints/AP") == 1.0
    assert [gain("VOC-semseg", w, "sem_seg/mIoU") for w in (moco, instagram)] == [-1.9, -0.8]
    assert gain("Cityscapes-semseg", instagram, "sem_seg/mIoU") == 0.9
    assert min(gain("LVIS-FPN-2x", w, "segm/AP") for w in (moco, instagram)) > 0


def test_a_run_too_short_for_curves_is_reported_without_them(tmp_path):
    """One line of training and one of evaluation: two records, of which no scalar makes a curve."""
    run = write_run(tmp_path / "short", steps=1)
    with (run / "metrics.json").open("a") as file:
        file.write(json.dumps({"iteration": 20, "bbox/AP": 4.0}) + "\n")
    out = tmp_path / "out"
    page = build_report(read_runs([run]), out).write(out).read_text(encoding="utf-8")
    assert "Training curves" not in page
    assert "| short" in (tmp_path / "out/report.md").read_text(encoding="utf-8")


def test_pretraining_runs_are_recognised(tmp_path):
    write_pretraining(tmp_path / "pre", queue=255)
    report = build_report(read_runs([tmp_path / "pre"]))
    (values,) = report.as_dict()["pretraining"]
    tail = [7 - i / 100 for i in range(190, 200)]
    assert values["loss"] == pytest.approx(statistics.mean(tail))
    assert values["chance_loss"] == pytest.approx(math.log(256))


@pytest.mark.parametrize(
    "content", ["", '{"protocol": "VOC", "bb', "[]", "{}", '{"protocol": "VOC"}', "\x00\xff"]
)
def test_a_broken_results_file_is_named_and_the_others_are_reported(tmp_path, content):
    write_run(tmp_path / "good")
    write_run(tmp_path / "bad")
    (tmp_path / "bad" / "results.json").write_text(content)
    report = build_report(read_runs([tmp_path / "bad", tmp_path / "good"]))
    assert [g.label for t in report.tables for g in t.groups] == ["good"]
    assert any(str(tmp_path / "bad" / "results.json") in note for note in report.notes)


def test_an_unevaluated_run_is_named(tmp_path):
    write_run(tmp_path / "good")
    (write_run(tmp_path / "early") / "results.json").unlink()
    report = build_report(read_runs([tmp_path / "early", tmp_path / "good"]))
    assert any("early is not evaluated" in note for note in report.notes)


def test_a_python_object_in_config_is_not_built(tmp_path):
    write_run(tmp_path / "x")
    (tmp_path / "x" / "config.yaml").write_text("A: !!python/object/apply:os.getcwd []")
    run = read_run(tmp_path / "x")
    assert run.config == {}
    assert "config.yaml" in run.problems[0]


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.links, self.tags, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "poster", "data"):
                self.sources.append(value)
            if name in ("href", "action"):
                self.links.append(value)

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_everything_and_needs_no_network(tmp_path):
    paths = [*two_groups(tmp_path / "runs"), write_pretraining(tmp_path / "pre")]
    page = build_report(read_runs(paths), tmp_path / "report").write(tmp_path / "report")
    html = page.read_text(encoding="utf-8")
    parsed = Page()
    parsed.feed(html)
    assert parsed.sources
    assert all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    assert not parsed.links
    assert not {"script", "link", "iframe"} & set(parsed.tags)
    assert not re.search(r"https?://|url\(|@import", re.sub(r"base64,[^\"]+", "", html))
    assert "<b>dog|" in parsed.text  # a class name is text, never markup


def test_names_cannot_break_the_markdown(tmp_path):
    """Bars, tags and line breaks in the names of classes, runs and groups stay text."""
    evil = "a|<b>\nc"
    scores = {"AP": 40.0, "per_class": {evil: 41.0}}
    run = write_run(tmp_path / "x|<i>y", bbox=scores, deviations=[evil], dataset=evil)
    report = build_report(read_runs([run]))
    lines = report.text().splitlines()
    assert not [line for line in lines if re.search(r"(?<!\\)<", line)]
    assert "| a\\|\\<b> c |" in " ".join(report.text().split())
    assert "## VOC on a\\|\\<b> c" in lines
    assert "* a\\|\\<b> c" in lines
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("| x")}
    assert cells <= {4}
    assert "x|<i>y" in report.summary()


def test_report_files_agree_and_the_json_is_strict(tmp_path):
    paths = two_groups(tmp_path / "runs")
    out = tmp_path / "deep" / "report"
    report = build_report(read_runs(paths), out)
    report.write(out)
    assert sorted(p.name for p in out.iterdir()) == [
        "curves.png", "report.html", "report.json", "report.md"
    ]  # fmt: skip

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    values = json.loads((out / "report.json").read_text(), parse_constant=refuse)
    groups = {group["label"]: group for group in values["tables"][0]["groups"]}
    assert groups["moco"]["metrics"]["bbox/AP"]["values"] == [55, 55.3, 55.6]
    assert (out / "report.md").read_text(encoding="utf-8") == report.text()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    file = replace_text(tmp_path / "a" / "x.txt", "old")

    def fail(stream):
        stream.write(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        replace_file(file, fail)
    assert [(p.name, p.read_text()) for p in file.parent.iterdir()] == [("x.txt", "old")]


def test_command_prints_the_table_and_writes_the_page(tmp_path, capsys):
    paths = two_groups(tmp_path / "runs")
    assert main([*map(str, paths), "-o", str(tmp_path / "out")]) is None
    assert "moco minus random" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "parent", "broken"])
def test_command_names_what_is_wrong_in_one_line(tmp_path, capsys, kind):
    target = tmp_path / kind
    if kind != "missing":
        target.mkdir()
    if kind == "parent":
        write_run(target / "inside")
    if kind == "broken":
        (target / "results.json").write_text("{")
    assert main([str(target), "-o", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert str(target) in error
    assert len(error.strip().splitlines()) == 1
    assert not Path(tmp_path / "out").exists()
