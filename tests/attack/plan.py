"""Which tool reads which hostile file: every case becomes a try of each tool that would meet it."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.attack import (
    annotations,
    archives,
    configs,
    pickles,
    pictures,
    run_directories,
)
from tests.attack.arena import PROOF, Try
from tests.attack.ground import DETECT, PRETRAIN, Ground, coco_content
from tools import convert, inspect_run, predict, pretrain, probe, report, train_net

Main = Callable[[list[str]], Any]
Write = Callable[[Path], object]
# A tool on one kind of file: its name and function, its words, where the file goes in the sandbox,
# and what else is put there first.
Use = tuple[str, Main, Sequence[Any], str, Write | None]
MAKE = Path(PROOF)  # the proof as payloads name it: they run in the sandbox


def plan(ground: Ground) -> dict[str, Iterator[tuple[str, Write, Sequence[Use]]]]:
    """The cases of each kind, with the tools that read them."""
    return {
        "pickles that call": _in_turn(_bytes(pickles.code_files(MAKE), _tensor_uses(ground)), 2),
        "pickles in all forms": _in_turn(
            _bytes(pickles.crossed_files(MAKE), _tensor_uses(ground)), 1
        ),
        "files of tensors that cost": _in_turn(
            _bytes(pickles.costly_files(), _tensor_uses(ground)), 4
        ),
        "damaged checkpoints": _in_turn(_damaged(ground), 1),
        "crafted checkpoints": _crafted(ground),
        "YAML": _in_turn(_yaml(ground), 1),
        "pictures": _in_turn(_pictures(ground), 6),
        "annotations": _annotations(ground),
        "tar shards": _bytes(archives.cases(MAKE), _shard_uses(ground)),
        "run directories": _in_turn(_run_directories(ground), 1),
    }


def tries(kind: str, ground: Ground, root: Path) -> Iterator[Try]:
    """The tries of one kind, numbered."""
    number = 0
    for name, write, uses in plan(ground)[kind]:
        for tool, function, words, place, before in uses:
            number += 1

            def prepare(
                sandbox: Path, write: Write = write, place: str = place, before: Any = before
            ) -> None:
                if before is not None:
                    before(sandbox)
                target = sandbox / place
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.is_file() or target.is_symlink():
                    target.unlink()
                write(target)

            yield Try(
                f"{kind}: {name}: {tool}",
                function,
                [str(word) for word in words],
                root / f"{kind.replace(' ', '-').replace(',', '')}-{number:05d}",
                prepare,
            )


def _bytes(
    cases: Iterator[tuple[str, bytes]], uses: Sequence[Use]
) -> Iterator[tuple[str, Write, Sequence[Use]]]:
    for name, content in cases:
        yield name, lambda path, content=content: path.write_bytes(content), uses


def _each(
    cases: Iterator[tuple[str, Write]], uses: Sequence[Use]
) -> Iterator[tuple[str, Write, Sequence[Use]]]:
    for name, write in cases:
        yield name, write, uses


def _in_turn(
    cases: Iterator[tuple[str, Write, Sequence[Use]]], count: int
) -> Iterator[tuple[str, Write, Sequence[Use]]]:
    """Every case on the first of its tools and on ``count`` of the others, which take turns."""
    for number, (name, write, (first, *others)) in enumerate(cases):
        turns = {(number * count + i) % len(others) for i in range(count)} if others else ()
        yield name, write, [first, *(others[i] for i in sorted(turns))]


# Files of tensors.


def _reader_use() -> Use:
    return "reader", _read, ["x.pth"], "x.pth", None


def _read(argv: list[str]) -> int:
    from moco_common.errors import run_tool
    from moco_common.reader.formats import read_checkpoint

    def work() -> None:
        read_checkpoint(argv[0])

    return run_tool(work)


def _tensor_uses(ground: Ground) -> list[Use]:
    return [
        _reader_use(),
        *_foreign_uses(ground),
        *_pretraining_uses(ground),
        *_detection_uses(ground),
    ]


def _foreign_uses(ground: Ground) -> list[Use]:
    """Tools that read the checkpoints of other projects."""
    small = ["--crop-size", "32", "--workers", "1", "--no-cache"]
    probed = ["x.pth", "--train", ground.photographs, "-o", "out.json", *small]
    train = ["--config", "scenes", "--train-data", f"voc:{ground.voc}:train", "--output-dir", "out"]
    return [
        ("convert", convert.main, ["x.pth", "-o", "out.pkl"], "x.pth", None),
        ("probe", probe.main, probed, "x.pth", None),
        ("weights", train_net.main, [*train, *DETECT, "MODEL.WEIGHTS", "x.pth"], "x.pth", None),
    ]


def _pretraining_uses(ground: Ground) -> list[Use]:
    resumed = ["--resume", *_pretrain_words(ground), "--output-dir", "run", "SOLVER.MAX_ITER", "3"]
    return [
        ("inspect", inspect_run.main, ["x.pth", "--no-images", "-o", "out"], "x.pth", None),
        ("resume", pretrain.main, resumed, "run/checkpoint_last.pth", None),
    ]


def _pretrain_words(ground: Ground) -> list[Any]:
    words = ["--config", "moco-v2", "--data", ground.photographs, *PRETRAIN]
    return [*words, "MODEL.DEPTH", "50"]


def _detection_uses(ground: Ground) -> list[Use]:
    photo, config = ground.photographs / "blue" / "00.jpg", ground.detection / "config.yaml"
    drawn = [photo, "--config", config, "--weights", "x.pth", "-o", "out"]
    evaluated = ["--eval-only", "--config", config, "--output-dir", "out", "MODEL.WEIGHTS", "x.pth"]
    resumed = ["--resume", "--output-dir", "run", "SOLVER.MAX_ITER", "3"]
    return [
        ("predict", predict.main, drawn, "x.pth", None),
        ("evaluate", train_net.main, evaluated, "x.pth", None),
        ("resume detector", train_net.main, resumed, "run/model_0000001.pth", _unfinished(ground)),
    ]


def _unfinished(ground: Ground) -> Write:
    """A fine-tuning run's directory, but for its checkpoint."""

    def write(sandbox: Path) -> None:
        (sandbox / "run").mkdir()
        shutil.copy(ground.detection / "config.yaml", sandbox / "run")
        shutil.copy(ground.detection / "metrics.json", sandbox / "run")
        (sandbox / "run" / "last_checkpoint").write_text("model_0000001.pth")

    return write


def _damaged(ground: Ground) -> Iterator[tuple[str, Write, Sequence[Use]]]:
    last = ground.pretraining / "checkpoint_last.pth"
    foreign = _foreign_uses(ground)
    for seed, (file, uses, cuts, flips) in enumerate(
        (
            (last, [*_pretraining_uses(ground), *foreign[:2]], 60, 40),
            (ground.detection / "model_final.pth", _detection_uses(ground), 60, 40),
            (ground.backbone, [foreign[2]], 40, 40),
        )
    ):
        cases = run_directories.damaged(file.read_bytes(), seed, cuts, flips)
        yield from _bytes(((f"{file.name} {name}", content) for name, content in cases), uses)


def _crafted(ground: Ground) -> Iterator[tuple[str, Write, Sequence[Use]]]:
    own = [*_pretraining_uses(ground), *_foreign_uses(ground)[:2]]
    detector = _detection_uses(ground)
    for number, (name, write) in enumerate(run_directories.crafted_pretraining(ground, MAKE)):
        yield name, write, [own[1], own[(0, 2, 3)[number % 3]]]
    for number, (name, write) in enumerate(run_directories.crafted_detection(ground)):
        yield name, write, [detector[2], *([detector[number % 2]] if number % 4 == 0 else [])]
    yield from _each(run_directories.crafted_backbone(ground), _foreign_uses(ground)[2:])
    for name, write in pictures.special_files():
        yield name, write, _tensor_uses(ground)


# Configurations.


def _yaml(ground: Ground) -> Iterator[tuple[str, Write, Sequence[Use]]]:
    photo, hostile = ground.photographs / "blue" / "00.jpg", configs.MAIN
    views = ["--config", hostile, "--data", ground.photographs, "--show-views", "out.png"]
    random = ["random", "--config", hostile, "--train", ground.photographs, "-o", "out.json"]
    weights = ground.detection / "model_final.pth"
    drawn = [photo, "--config", hostile, "--weights", weights, "-o", "out"]
    evaluated = ["--eval-only", "--config", hostile, "--output-dir", "out"]
    pretraining: list[Use] = [
        ("explain", pretrain.main, ["--config", hostile, "--explain"], hostile, None),
        ("views", pretrain.main, views, hostile, None),
        ("probe", probe.main, [*random, "--crop-size", "32", "--workers", "1"], hostile, None),
    ]
    detection: list[Use] = [
        ("explain", train_net.main, ["--config", hostile, "--explain"], hostile, None),
        ("predict", predict.main, drawn, hostile, None),
        ("evaluate", train_net.main, [*evaluated, "MODEL.WEIGHTS", weights], hostile, None),
    ]
    for cases, uses in (
        (configs.pretraining(MAKE), pretraining),
        (configs.detection(MAKE), detection),
    ):
        for name, files in cases:
            yield name, _files(files), uses


def _files(files: dict[str, str]) -> Write:
    def write(path: Path) -> None:
        for name, text in files.items():
            path.with_name(name).write_text(text, encoding="utf-8", errors="surrogatepass")

    return write


# Pictures.


def _pictures(ground: Ground) -> Iterator[tuple[str, Write, Sequence[Use]]]:
    place, photos = "photos/blue/00.jpg", _photos(ground)
    last = ground.pretraining / "checkpoint_last.pth"
    small = ["--crop-size", "32", "--workers", "1"]
    train = [*PRETRAIN, "--output-dir", "out"]
    detect = ["--config", "scenes-random", "--output-dir", "out", *DETECT]
    at, name = "scenes/voc/JPEGImages", "train_00000.jpg"
    scenes = _scenes(ground)
    own = ["--train-data", "voc:scenes/voc:train"]
    drawn = [place, "--run", ground.detection, "-o", "out"]
    looked = [last, "--data", "photos", "-o", "out", "--workers", "1", "--images", "9", "-k", "1"]
    coco = f"coco:scenes/coco/instances_train.json:{at}"
    uses: list[Use] = [
        (
            "pretrain",
            pretrain.main,
            ["--config", "moco-v2", "--data", "photos", *train],
            place,
            photos,
        ),
        (
            "views",
            pretrain.main,
            ["--config", "moco-v2", "--data", "photos", "--show-views", "v.png"],
            place,
            photos,
        ),
        (
            "list",
            pretrain.main,
            ["--config", "moco-v2", "--data", "photos/list.txt", *train],
            place,
            photos,
        ),
        ("probe", probe.main, [last, "--train", "photos", "-o", "out.json", *small], place, photos),
        ("inspect", inspect_run.main, looked, place, photos),
        ("predict", predict.main, drawn, place, photos),
        (
            "predict folder",
            predict.main,
            ["photos", "--run", ground.detection, "-o", "out"],
            place,
            photos,
        ),
        ("train", train_net.main, [*detect, *own], f"{at}/{name}", scenes),
        ("check images", train_net.main, [*detect, *own, "--check-images"], f"{at}/{name}", scenes),
        (
            "test",
            train_net.main,
            [*detect, *own, "--test-data", "voc:scenes/voc:test"],
            f"{at}/test_00000.jpg",
            scenes,
        ),
        ("coco", train_net.main, [*detect, "--train-data", coco], f"{at}/{name}", scenes),
        (
            "yolo",
            train_net.main,
            [*detect, "--train-data", "yolo:yolo:train"],
            "yolo/images/train/a.jpg",
            _yolo(ground),
        ),
        (
            "labels",
            train_net.main,
            ["--config", "scenes-random", "--explain", "--train-data", "semseg:images:labels"],
            "labels/a.png",
            _semseg(ground),
        ),
        ("report", report.main, ["run", "-o", "out"], f"{at}/test_00000.jpg", _evaluated(ground)),
    ]
    yield from _each(pictures.cases(MAKE), uses)
    video: list[Use] = [
        ("predict video", predict.main, ["photos/x.mp4", *drawn[1:]], "photos/x.mp4", photos),
        ("predict folder", predict.main, ["photos", *drawn[1:]], "photos/x.mp4", photos),
    ]
    yield from _each(pictures.cases(MAKE), video)


def _photos(ground: Ground) -> Write:
    def write(sandbox: Path) -> None:
        shutil.copytree(ground.photographs, sandbox / "photos")
        names = [f"{folder}/{i:02d}.jpg" for folder in ("blue", "amber", "green") for i in range(4)]
        (sandbox / "photos" / "list.txt").write_text("\n".join(names) + "\n")

    return write


def _scenes(ground: Ground) -> Write:
    return lambda sandbox: shutil.copytree(ground.voc.parent, sandbox / "scenes")


def _yolo(ground: Ground) -> Write:
    def write(sandbox: Path) -> None:
        for name in ("a", "b", "c"):
            image = sandbox / "yolo" / "images" / "train" / f"{name}.jpg"
            label = sandbox / "yolo" / "labels" / "train" / f"{name}.txt"
            image.parent.mkdir(parents=True, exist_ok=True)
            label.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ground.photographs / "blue" / "00.jpg", image)
            label.write_text("0 0.5 0.5 0.2 0.2\n1 0.4 0.4 0.2 0.2\n")
        (sandbox / "yolo" / "data.yaml").write_text("train: images/train\nnames: [a, b]\n")

    return write


def _semseg(ground: Ground) -> Write:
    def write(sandbox: Path) -> None:
        import cv2
        import numpy as np

        for name in ("a", "b"):
            for folder in ("images", "labels"):
                (sandbox / folder).mkdir(exist_ok=True)
            shutil.copy(ground.photographs / "blue" / "00.jpg", sandbox / "images" / f"{name}.jpg")
            cv2.imwrite(str(sandbox / "labels" / f"{name}.png"), np.zeros((40, 48), np.uint8))

    return write


def _evaluated(ground: Ground) -> Write:
    """A run whose results name the data set in the sandbox."""

    def write(sandbox: Path) -> None:
        shutil.copytree(ground.voc.parent, sandbox / "scenes")
        shutil.copytree(ground.detection, sandbox / "run")
        results = json.loads((sandbox / "run" / "results.json").read_text())
        results["dataset"] = f"voc:{sandbox}/scenes/voc:test"
        (sandbox / "run" / "results.json").write_text(json.dumps(results))

    return write


# Annotations.


def _annotations(ground: Ground) -> Iterator[tuple[str, Write, Sequence[Use]]]:
    scenes, images = _scenes(ground), "scenes/voc/JPEGImages"
    explain = ["--config", "scenes-random", "--explain", "--train-data"]
    train = ["--config", "scenes-random", "--output-dir", "out", *DETECT, "--train-data"]
    place = "scenes/coco/instances_train.json"
    spec = f"coco:{place}:{images}"
    small = ["--config", "moco-v2", *PRETRAIN, "--output-dir", "out", "--data"]
    coco: list[Use] = [
        ("coco", train_net.main, [*explain, spec], place, scenes),
        ("coco, train", train_net.main, [*train, spec], place, scenes),
        ("coco, pretrain", pretrain.main, [*small, spec], place, scenes),
    ]
    test = ["--test-data", f"coco:scenes/coco/instances_test.json:{images}"]
    tested: list[Use] = [
        (
            "coco, test",
            train_net.main,
            [*train, spec, *test],
            "scenes/coco/instances_test.json",
            scenes,
        )
    ]
    for number, (name, write) in enumerate(annotations.coco(coco_content(ground))):
        yield f"COCO: {name}", write, coco if number % 4 == 0 else [coco[0], coco[2]]
    for number, (name, write) in enumerate(annotations.coco(coco_content(ground, "test"))):
        if number % 4 == 1:
            yield f"COCO test: {name}", write, tested
    place = "scenes/voc/Annotations/train_00000.xml"
    voc: list[Use] = [
        ("voc", train_net.main, [*explain, "voc:scenes/voc:train"], place, scenes),
        ("voc, train", train_net.main, [*train, "voc:scenes/voc:train"], place, scenes),
    ]
    honest = (ground.voc / "Annotations" / "train_00000.xml").read_text()
    for number, (name, write) in enumerate(annotations.voc(honest)):
        yield f"VOC: {name}", write, voc if number % 3 == 0 else voc[:1]
    yolo = _yolo(ground)
    labels: list[Use] = [
        ("yolo", train_net.main, [*explain, "yolo:yolo:train"], "yolo/labels/train/a.txt", yolo),
        (
            "yolo, train",
            train_net.main,
            [*train, "yolo:yolo:train"],
            "yolo/labels/train/a.txt",
            yolo,
        ),
    ]
    yield from _each(annotations.yolo_labels(), labels)
    described = [("yolo", train_net.main, [*explain, "yolo:yolo:train"], "yolo/data.yaml", yolo)]
    yield from _each(annotations.yolo_descriptions(MAKE), described)
    lists: list[Use] = [
        ("list, pretrain", pretrain.main, [*small, "list.txt"], "list.txt", None),
        (
            "split, voc",
            train_net.main,
            [*explain, "voc:scenes/voc:train"],
            "scenes/voc/ImageSets/Main/train.txt",
            scenes,
        ),
        (
            "split, yolo",
            train_net.main,
            [*explain, "yolo:yolo:train"],
            "yolo/train.txt",
            _listed(ground),
        ),
        (
            "classes, semseg",
            train_net.main,
            [*explain, "semseg:images:labels"],
            "labels/classes.txt",
            _semseg(ground),
        ),
    ]
    yield from _each(annotations.lists(Path(".")), lists)


def _listed(ground: Ground) -> Write:
    def write(sandbox: Path) -> None:
        _yolo(ground)(sandbox)
        (sandbox / "yolo" / "data.yaml").write_text("train: train.txt\nnames: [a, b]\n")

    return write


# Shards.


def _shard_uses(ground: Ground) -> list[Use]:
    last = ground.pretraining / "checkpoint_last.pth"
    small = ["--config", "moco-v2", *PRETRAIN, "--output-dir", "out", "--data"]
    looked = [last, "-o", "out", "--workers", "1", "--images", "9", "-k", "1", "--data"]
    piped = "shards:pipe:cat x.tar"
    return [
        ("indexed", pretrain.main, [*small, "shards:x.tar"], "x.tar", _honest_tar(ground)),
        ("piped", pretrain.main, [*small, piped], "x.tar", None),
        ("views", pretrain.main, [*small, "shards:x.tar", "--show-views", "v.png"], "x.tar", None),
        ("inspect", inspect_run.main, [*looked, "shards:x.tar"], "x.tar", None),
    ]


def _honest_tar(ground: Ground) -> Write:
    return lambda sandbox: None


# Run directories.


def _run_directories(ground: Ground) -> Iterator[tuple[str, Write, Sequence[Use]]]:
    photo = ground.photographs / "blue" / "00.jpg"
    again = ["--resume", *_pretrain_words(ground), "--output-dir", "run", "SOLVER.MAX_ITER", "3"]
    random = [
        "random",
        "--config",
        "run/config.yaml",
        "--train",
        ground.photographs,
        "-o",
        "out.json",
    ]
    random += ["--crop-size", "32", "--workers", "1", "--no-cache"]

    def own(place: str) -> list[Use]:
        before = _copied(ground.pretraining)
        bare = _copied(ground.pretraining, without=".pth")
        return [
            ("inspect", inspect_run.main, ["run", "--no-images"], f"run/{place}", before),
            ("inspect bare", inspect_run.main, ["run", "--workers", "1"], f"run/{place}", bare),
            ("report", report.main, ["run", "-o", "out"], f"run/{place}", before),
            ("resume", pretrain.main, again, f"run/{place}", before),
            *([("probe", probe.main, random, f"run/{place}", before)] if "config" in place else []),
            (
                "convert",
                convert.main,
                ["run/checkpoint_last.pth", "-o", "out.pkl", "--no-proof"],
                f"run/{place}",
                before,
            ),
        ]

    def detector(place: str) -> list[Use]:
        before = _copied(ground.detection)
        bare = _copied(ground.detection, without=".pth")
        fresh = ["--resume", "--output-dir", "run"]
        return [
            ("report", report.main, ["run", "-o", "out"], f"run/{place}", before),
            (
                "evaluate",
                train_net.main,
                ["--eval-only", "--output-dir", "run"],
                f"run/{place}",
                before,
            ),
            (
                "evaluate bare",
                train_net.main,
                ["--eval-only", "--output-dir", "run"],
                f"run/{place}",
                bare,
            ),
            ("resume", train_net.main, [*fresh, "SOLVER.MAX_ITER", "3"], f"run/{place}", before),
            ("predict", predict.main, [photo, "--run", "run", "-o", "out"], f"run/{place}", before),
            (
                "explain",
                train_net.main,
                ["--output-dir", "run", "--explain"],
                f"run/{place}",
                before,
            ),
        ]

    folders = ((ground.pretraining, own), (ground.detection, detector))
    for folder, uses in folders:
        files = {
            "config.yaml": run_directories.config_files(folder / "config.yaml", MAKE),
            "metrics.json": run_directories.metrics_files(),
            "run.lock": run_directories.lock_files(),
        }
        if folder == ground.detection:
            results = json.loads((folder / "results.json").read_text())
            found = json.loads((folder / "inference" / "coco_instances_results.json").read_text())
            files |= {
                "results.json": run_directories.results_files(results, MAKE),
                "inference/coco_instances_results.json": run_directories.prediction_files(found),
                "last_checkpoint": run_directories.last_checkpoint_files(),
            }
        for place, cases in files.items():
            relevant = _relevant(place, uses(place))
            for name, write in cases:
                yield f"{folder.name}/{place}: {name}", write, relevant
        for name, link in run_directories.linked_directories():
            linked = [
                (tool, main, words, "run", before) for tool, main, words, _, before in uses("x")
            ]
            yield f"{folder.name}: {name}", link, linked


def _relevant(place: str, uses: list[Use]) -> list[Use]:
    """The tools that read a file of a run at all."""
    readers = {
        "metrics.json": ("inspect", "inspect bare", "report", "resume"),
        "results.json": ("report", "evaluate"),
        "inference/coco_instances_results.json": ("report",),
        "last_checkpoint": ("resume", "evaluate", "predict"),
    }
    wanted = readers.get(place)
    return [use for use in uses if wanted is None or use[0] in wanted]


def _copied(folder: Path, without: str = "never") -> Write:
    def write(sandbox: Path) -> None:
        shutil.copytree(folder, sandbox / "run", ignore=shutil.ignore_patterns(f"*{without}*"))

    return write
