"""Each file of a data set is opened once for a run: by Python's own audit of every `open`."""

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from moco_det.config.defaults import is_semantic_model
from moco_det.data.catalog import SharedData, add_entries, own_entries
from moco_det.data.register import dataset_report, register
from moco_det.engine.setup import Options, prepare
from tests.conftest import CLASSES, NARROW, QUICK

ROOT = Path(__file__).parents[3]
QUICKER = [*NARROW, *QUICK, "SOLVER.MAX_ITER", "1", "TEST.PRECISE_BN.ENABLED", "False"]
# Imported by every Python process that finds it on its path: writes down what is opened.
AUDIT = """
import os, sys
log = os.open(os.environ["OPENED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def note(event, args):
    if event == "open" and str(args[0]).endswith((".xml", ".json")):
        os.write(log, f"{args[0]}\\n".encode())
sys.addaudithook(note)
"""
opened = None  # a Counter while a test counts


def _count(event, args):
    if opened is not None and event == "open":
        opened[str(args[0])] += 1


@pytest.fixture(scope="module", autouse=True)
def _audit():
    sys.addaudithook(_count)


def opens_of(work):
    """How often each file is opened in this process."""
    global opened
    opened = Counter()
    try:
        work()
        return opened
    finally:
        opened = None


def annotations(counter, folder):
    return {Path(p).name: n for p, n in counter.items() if Path(p).parent == Path(folder)}


@pytest.mark.parametrize("launcher", ["spawn", "torchrun"])
def test_every_annotation_is_opened_once_for_all_ranks_and_trials(launcher, voc_dir, tmp_path):
    """Train and test set from one folder, a share of the labels, two runs, two ranks."""
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit/sitecustomize.py").write_text(AUDIT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    start = torchrun if launcher == "torchrun" else [sys.executable]
    args = [*start, "tools/train_net.py", "--config", "VOC-random"]
    args += ["--train-data", f"voc:{voc_dir}:trainval", "--test-data", f"voc:{voc_dir}:test"]
    args += ["--output-dir", str(tmp_path / "run"), "--trials", "2"]
    args += ["--num-gpus", "2"] if launcher == "spawn" else []
    done = subprocess.run(
        [*args, *QUICKER, "DATASETS.LABEL_SHARE", "0.5"],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path / "audit"), str(ROOT)]),
            "OPENED": str(tmp_path / "opened"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    counts = Counter((tmp_path / "opened").read_text().splitlines())
    files = {path.name: 1 for path in (voc_dir / "Annotations").iterdir()}
    assert annotations(counts, voc_dir / "Annotations") == files
    for trial in range(2):
        results = json.loads((tmp_path / f"run/trial_{trial}/results.json").read_text())
        assert set(results["bbox"]["per_class"]) == set(CLASSES)


def prepared(protocol, train, test=None, **options):
    overrides = ["MODEL.DEVICE", "cpu", *options.pop("overrides", ())]
    return prepare(Options(f"{protocol}-random", train, test, overrides=overrides, **options))


def coco_of_one_class(spec, folder, name):
    """The objects of one class, in a file of their own."""
    file, _, images = spec.removeprefix("coco:").rpartition(":")
    content = json.loads(Path(file).read_text())
    content["categories"] = [c for c in content["categories"] if c["name"] == name]
    known = {c["id"] for c in content["categories"]}
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] in known]
    (folder / f"{name}.json").write_text(json.dumps(content))
    return f"coco:{folder / f'{name}.json'}:{images}"


def test_lists_of_classes_that_differ_cost_no_second_reading(coco_spec, tmp_path):
    specs = [coco_of_one_class(coco_spec, tmp_path, name) for name in ("nut", "bolt")]
    plans = []
    counts = opens_of(lambda: plans.append(prepared("COCO-FPN-1x", specs, specs[0])))
    assert annotations(counts, tmp_path) == {"nut.json": 1, "bolt.json": 1}
    (plan,) = plans
    assert tuple(specs) == plan.cfg.DATASETS.TRAIN
    assert (specs[0],) == plan.cfg.DATASETS.TEST
    assert plan.cfg.DATASETS.CLASSES == ["nut", "bolt"]
    for spec, number in zip(specs, (0, 1), strict=True):
        assert MetadataCatalog.get(spec).thing_classes == ["nut", "bolt"]
        found = {a["category_id"] for r in DatasetCatalog.get(spec) for a in r["annotations"]}
        assert found == {number}


def test_an_evaluation_reads_the_test_set_alone_and_once(voc_dir, coco_spec):
    train = ["DATASETS.TRAIN", f"('{coco_spec}',)", "DATASETS.CLASSES", str(list(CLASSES))]
    test = f"voc:{voc_dir}:test"
    counts = opens_of(lambda: prepared("VOC", [], test, eval_only=True, overrides=train))
    assert set(annotations(counts, voc_dir / "Annotations").values()) == {1}
    assert not [path for path in counts if path.endswith("instances.json")]


def test_test_images_that_are_trained_on_are_reported(voc_dir):
    apart, same = (
        "\n".join(prepared("VOC", [f"voc:{voc_dir}:{train}"], f"voc:{voc_dir}:test").notes)
        for train in ("trainval", "all")
    )
    assert "are training images too" not in apart
    assert "warning: 2 of 2 test images are training images too (first: " in same


def test_headers_of_images_with_pixel_labels_are_read_once_for_train_and_test(tmp_path):
    for folder, suffix in (("images", "jpg"), ("labels", "png")):
        (tmp_path / folder).mkdir()
        for i in range(3):
            cv2.imwrite(f"{tmp_path}/{folder}/{i}.{suffix}", np.full((6, 8), i, np.uint8))
    spec = f"semseg:{tmp_path}/images:{tmp_path}/labels"
    plans = []
    counts = opens_of(lambda: plans.append(prepared("VOC-semseg", [spec], spec)))
    assert is_semantic_model(plans[0].cfg)
    # Twice: for the headers of both sets, and for the files' ends, which are checked in a test set.
    assert annotations(counts, tmp_path / "images") == {f"{i}.jpg": 2 for i in range(3)}
    # The labels twice: for their classes, and for their size.
    assert annotations(counts, tmp_path / "labels") == {f"{i}.png": 2 for i in range(3)}


def _registered_elsewhere(data, name, results):
    before = name in DatasetCatalog
    data.register()
    metadata = MetadataCatalog.get(name).as_dict()
    results.put((before, DatasetCatalog.get(name), metadata))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_started_process_gets_the_records_and_metadata_without_a_file(method, coco_spec):
    name = register(coco_spec)
    context = get_context(method)
    results = context.SimpleQueue()
    data = SharedData([name, name, "coco_2017_val"])
    child = context.Process(target=_registered_elsewhere, args=(data, name, results))
    child.start()
    known, records, metadata = results.get()
    child.join()
    assert child.exitcode == 0
    assert not known
    assert records == DatasetCatalog.get(name)
    assert metadata == MetadataCatalog.get(name).as_dict()
    assert dataset_report(name).objects == 4


def test_data_sets_of_detectron2_are_not_handed_over(coco_spec, voc_dir):
    names = [register(coco_spec), register(f"voc:{voc_dir}:test"), "coco_2017_val", "nothing"]
    entries = own_entries(names)
    assert [entry.name for entry in entries] == names[:2]
    before = [DatasetCatalog.get(name) for name in names[:2]]
    add_entries(pickle.loads(pickle.dumps(entries)))
    assert [DatasetCatalog.get(name) for name in names[:2]] == before
