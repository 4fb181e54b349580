"""Run directories and checkpoints whose contents are of other types, sizes or places."""

import json
import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from pretrain.checkpoint import format as checkpoint
from tests.attack.configs import texts
from tests.attack.ground import Ground, detection_checkpoint, pretraining_checkpoint
from tests.attack.pictures import special_files

Write = Callable[[Path], object]
Case = tuple[str, Write]
VALUES: dict[str, Any] = {
    "nothing": None,
    "true": True,
    "-1": -1,
    "2^63": 2**63,
    "10^400": 10**400,
    "a fraction": 0.5,
    "1e308": 1e308,
    "infinity": math.inf,
    "NaN": math.nan,
    "text": "x",
    "text | with <b>tags</b>\n": "a|b<script>x</script>\n# c",
    "control characters": "\x1b[31m\x00",
    "a list": [1, 2],
    "an empty list": [],
    "a mapping": {"a": 1},
    "an empty mapping": {},
    "deep lists": json.loads("[" * 400 + "]" * 400),
}
_TURNS = ("nothing", "-1", "a fraction", "NaN", "text", "an empty list", "a mapping")
_TENSORS: dict[str, Any] = {
    "a tensor": torch.ones(3),
    "an empty tensor": torch.empty(0),
    "a tensor of NaN": torch.full((2, 2), math.nan),
    "a tensor of text's type": torch.zeros(5056, dtype=torch.uint8),
    "a mapping of a tensor": {"torch": torch.zeros(2, 3)},
}


def specs(proof: Path) -> list[Any]:
    """What a file may name as its data, and would run, fetch or read for ever."""
    return [
        *(f"shards:pipe:touch {proof}", f"shards:pipe:touch {proof}; cat #{{0..3}}.tar"),
        *(f"shards:gs://x'; touch {proof}; '/a.tar", f"pipe:touch {proof}", "shards:/dev/zero"),
        *(f"shards:https://127.0.0.1:9/$(touch {proof}).tar", "https://127.0.0.1:9/x.txt"),
        *("shards:/tmp/{000000..999999999}.tar", "coco:/dev/zero:/tmp", "/dev/stdin", ""),
        *(f"coco:pipe:touch {proof}:/tmp", "coco:http://127.0.0.1:9/x.json:/tmp", "/etc/passwd"),
        *(f"voc:$(touch {proof}):train", "voc:/:all", "semseg:/dev:/dev", "yolo:/proc:train"),
        *(7, None, ["x"], {"a": 1}, "\x00", "x" * 100_000, "../" * 3_000),
    ]


def _paths(tree: dict[str, Any], depth: int) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (key,)
        if depth > 1 and isinstance(value, dict) and len(value) < 20:
            for rest in _paths(value, depth - 1):
                yield (key, *rest)


def _some(path: tuple[str, ...], values: dict[str, Any]) -> list[tuple[str, Any]]:
    """All values for a part at the top; a third of them, by its name, for one further down."""
    every = list(values.items())
    return every if len(path) == 1 else every[sum(map(ord, "".join(path))) % 3 :: 3]


def _with(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed = dict(tree)
    changed[path[0]] = value if len(path) == 1 else _with(changed[path[0]], path[1:], value)
    return changed


def _without(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    changed = dict(tree)
    if len(path) == 1:
        del changed[path[0]]
    else:
        changed[path[0]] = _without(changed[path[0]], path[1:])
    return changed


def sealed(content: dict[str, Any]) -> Write:
    """A pre-training checkpoint as this project writes it, with this content."""

    def write(path: Path) -> None:
        with path.open("w+b") as file:
            checkpoint._write_sealed(content, file)

    return write


def _saved(content: Any) -> Write:
    return lambda path: torch.save(content, path)


def crafted_pretraining(ground: Ground, proof: Path) -> Iterator[Case]:
    """Pre-training checkpoints of which one part is of another kind."""
    honest = pretraining_checkpoint(ground)
    for path in _paths(honest, 2):
        if path[0] == "state_dict" and len(path) > 1:
            continue
        yield f"no {'.'.join(path)}", sealed(_without(honest, path))
        for name, value in _some(path, VALUES | _TENSORS):
            yield f"{'.'.join(path)} is {name}", sealed(_with(honest, path, value))
    for name, text in texts(proof):
        yield f"config: {name}", sealed({**honest, "config": text})
    config = yaml.safe_load(honest["config"])
    for spec in specs(proof):
        changed = yaml.safe_dump({**config, "DATA": [spec]})
        yield f"DATA is {str(spec)[:60]!r}", sealed({**honest, "config": changed})
    for path in _paths(config, 2):
        name = _TURNS[sum(map(ord, "".join(path))) % len(_TURNS)]
        changed = yaml.safe_dump(_with(config, path, VALUES[name]))
        yield f"{'.'.join(path)} of its config is {name}", sealed({**honest, "config": changed})
    names = list(honest["state_dict"])
    for name in (names[0], names[-1]):
        for kind, value in (VALUES | _TENSORS).items():
            state = {**honest["state_dict"], name: value}
            yield f"state_dict.{name} is {kind}", sealed({**honest, "state_dict": state})


def crafted_detection(ground: Ground) -> Iterator[Case]:
    """Fine-tuning checkpoints of which one part is of another kind."""
    honest = detection_checkpoint(ground)
    for path in _paths(honest, 4):
        if path[0] == "model" and len(path) > 1 or len(path) > 3 and "hooks" not in path:
            continue
        yield f"no {'.'.join(path)}", _saved(_without(honest, path))
        for name, value in _some(path, VALUES | _TENSORS):
            yield f"{'.'.join(path)} is {name}", _saved(_with(honest, path, value))
    first = next(iter(honest["model"]))
    for kind, value in (VALUES | _TENSORS).items():
        yield (
            f"model.{first} is {kind}",
            _saved({**honest, "model": {**honest["model"], first: value}}),
        )


def crafted_backbone(ground: Ground) -> Iterator[Case]:
    """Converted weights of which one part is of another kind."""
    from moco_common.reader.formats import read_checkpoint

    honest = read_checkpoint(ground.backbone, copy=True)
    for path in _paths(honest, 2):
        if path[0] == "model" and len(path) > 1:
            continue
        yield f"no {'.'.join(path)}", _saved(_without(honest, path))
        for name, value in _some(path, VALUES | _TENSORS):
            yield f"{'.'.join(path)} is {name}", _saved(_with(honest, path, value))


def damaged(content: bytes, seed: int, cuts: int, flips: int) -> Iterator[tuple[str, bytes]]:
    """The same file cut at every kind of length, and with bits and blocks that have changed."""
    size, dice = len(content), random.Random(seed)
    lengths = {0, 1, 2, 3, 4, 8, 22, 30, 64, 100, 511, 512, 513, 4095, 4096, 4097}
    lengths |= {size - n for n in (1, 2, 3, 22, 64, 73, 74, 100, 512, 4096)}
    lengths |= {1 << n for n in range(9, 24)} | {dice.randrange(size) for _ in range(cuts)}
    for length in sorted(length for length in lengths if 0 <= length < size):
        yield f"cut to {length} bytes", content[:length]
    for _ in range(flips):
        place, bit = dice.randrange(size), dice.randrange(8)
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        yield f"bit {bit} of byte {place}", bytes(changed)
    for end in (0, 1):  # the table of contents of a zip, and its head
        for _ in range(flips):
            place = (
                size - 1 - dice.randrange(min(size, 3_000))
                if end
                else dice.randrange(min(size, 600))
            )
            changed = bytearray(content)
            changed[place] = dice.randrange(256)
            yield f"byte {place}", bytes(changed)
    for name, block in (("zeros", bytes(4096)), ("noise", dice.randbytes(4096))):
        for _ in range(3):
            place = dice.randrange(size)
            yield f"{name} from byte {place}", content[:place] + block + content[place + 4096 :]
    yield "twice", content + content
    yield "with something behind it", content + b"x" * 100


# Run directories: what is written into a copy of an honest one.


def metrics_files() -> Iterator[Case]:
    """Files ``metrics.json``."""
    for key in (
        "iteration",
        "loss",
        "total_loss",
        "accuracy",
        "spread",
        "lr",
        "knn_top1",
        "chance_loss",
    ):
        for name, value in VALUES.items():
            lines = [{"iteration": i, "loss": 1.0, "total_loss": 1.0, "lr": 0.1} for i in (1, 2, 3)]
            lines[1] = {**lines[1], key: value}
            yield f"{key} is {name}", _lines([json.dumps(line) for line in lines])
            yield f"{key} is always {name}", _lines([json.dumps({**x, key: value}) for x in lines])
    honest = '{"iteration": 1, "loss": 1.0}'
    for name, text in (
        ("deep lists", "[" * 100_000),
        ("deep mappings", '{"iteration": ' * 100_000),
        ("an integer of 100,000 digits", '{"iteration": ' + "9" * 100_000 + "}"),
        ("a line of 30 MB", '{"iteration": 1, "x": "' + "x" * 30_000_000 + '"}'),
        ("noise", "\x00\x01\xff"),
        ("a list", "[1]"),
        ("half a line", '{"iteration": 2, "lo'),
    ):
        yield name, _lines([honest, text, '{"iteration": 3, "loss": 2.0}'])
    yield "200,000 lines", _lines([honest] * 200_000)
    yield (
        "100,000 keys",
        _lines([json.dumps({"iteration": 1} | {f"k{i}": 1 for i in range(100_000)})]),
    )
    yield "bytes", lambda path: path.write_bytes(bytes(range(256)) * 50)
    yield "no text", lambda path: path.write_text("")
    yield from special_files()


def _lines(lines: Any) -> Write:
    text = "\n".join(lines) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8", errors="surrogatepass")


def results_files(honest: dict[str, Any], proof: Path) -> Iterator[Case]:
    """Files ``results.json``."""
    for path in _paths(honest, 3):
        yield f"no {'.'.join(path)}", _json(_without(honest, path))
        for name, value in _some(path, VALUES):
            yield f"{'.'.join(path)} is {name}", _json(_with(honest, path, value))
    for spec in specs(proof):
        yield f"dataset is {str(spec)[:60]!r}", _json({**honest, "dataset": spec})
    yield "deep lists", lambda path: path.write_text("[" * 100_000)
    yield "a long integer", lambda path: path.write_text('{"seed": ' + "9" * 100_000 + "}")
    yield "a list", lambda path: path.write_text("[1]")
    yield "half", lambda path: path.write_text(json.dumps(honest)[:100])
    yield "bytes", lambda path: path.write_bytes(bytes(range(256)) * 50)
    yield (
        "100,000 classes",
        _json({**honest, "bbox": {"AP": 1.0, "per_class": {f"c{i}": 1.0 for i in range(20_000)}}}),
    )
    yield from special_files()


def _json(content: Any) -> Write:
    return lambda path: path.write_text(json.dumps(content))


def prediction_files(honest: list[dict[str, Any]]) -> Iterator[Case]:
    """Files ``inference/coco_instances_results.json``."""
    box = {"image_id": 1, "category_id": 0, "bbox": [1, 1, 9, 9], "score": 0.5}
    first = honest[0] if honest else box
    for key in (*first, "segmentation"):
        for name, value in VALUES.items():
            yield f"{key} is {name}", _json([{**first, key: value}])
        yield f"no {key}", _json([{k: v for k, v in first.items() if k != key}])
    for name, value in {
        "run lengths that claim 2^60": {"size": [1 << 30, 1 << 30], "counts": "0" * 10},
        "run lengths of noise": {"size": [64, 64], "counts": "\x7f" * 5_000},
        "run lengths of size -1": {"size": [-1, 64], "counts": "0"},
        "run lengths without counts": {"size": [64, 64]},
    }.items():
        yield f"segmentation is {name}", _json([{**first, "segmentation": value}])
    yield "100,000 predictions", _json([first] * 100_000)
    yield "deep lists", lambda path: path.write_text("[" * 100_000)
    yield "a mapping", _json({"a": 1})
    yield "numbers", _json([1, 2])
    yield "half", lambda path: path.write_text(json.dumps([first] * 9)[:100])
    yield from special_files()


def last_checkpoint_files() -> Iterator[Case]:
    """Files ``last_checkpoint``."""
    for text in (
        "",
        "nothing.pth",
        "../../../etc/passwd",
        "/dev/zero",
        "/etc/passwd",
        ".",
        "..",
        "\x00",
        "model_final.pth\nmodel_0000000.pth",
        " model_final.pth ",
        "x" * 1_000_000,
        "-rf",
        "https://127.0.0.1:9/x.pth",
        "detectron2://x.pth",
        "config.yaml",
        "model_final.pth/..",
        "é.pth",
        "\ud800.pth",
        "$(touch x).pth",
        "last_checkpoint",
        "inference",
    ):
        data = text.encode(errors="surrogatepass")
        yield f"{text[:20]!r}", lambda path, data=data: path.write_bytes(data)
    yield from special_files()


def lock_files() -> Iterator[Case]:
    """Files by which a run holds its directory."""
    for text in (
        "",
        "{}",
        "[]",
        "null",
        '{"host": 1, "pid": "x"}',
        "[" * 100_000,
        "9" * 100_000,
        '{"host": "x", "pid": -1}',
        "\x00" * 1000,
    ):
        yield f"a lock of {text[:20]!r}", lambda path, text=text: path.write_text(text)


def config_files(honest: Path, proof: Path) -> Iterator[Case]:
    """Files ``config.yaml`` of a run."""
    config = yaml.safe_load(honest.read_text())
    for name, text in texts(proof):
        yield name, lambda path, text=text: path.write_text(text)
        yield (
            f"{name}, beside honest keys",
            lambda path, text=text: path.write_text(text + "\n" + honest.read_text()),
        )
    for path in _paths(config, 3):
        name = _TURNS[sum(map(ord, "".join(path))) % len(_TURNS)]
        changed = yaml.safe_dump(_with(config, path, VALUES[name]))
        yield f"{'.'.join(path)} is {name}", lambda file, text=changed: file.write_text(text)
    for key in ("DATA", ("DATASETS", "TRAIN"), ("DATASETS", "TEST"), ("MODEL", "WEIGHTS")):
        keys = (key,) if isinstance(key, str) else key
        if keys[0] not in config:
            continue
        for spec in (*specs(proof), "https://127.0.0.1:9/x.pth", "detectron2://../x"):
            changed = yaml.safe_dump(_with(config, keys, spec if keys[-1] == "WEIGHTS" else [spec]))
            yield (
                f"{'.'.join(keys)} is {str(spec)[:60]!r}",
                lambda file, text=changed: file.write_text(text),
            )
    yield "a base elsewhere", lambda path: path.write_text("_BASE_: /dev/zero\n")
    yield from special_files()


def linked_directories() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """What a directory may hold beside its files: links to where results would go."""
    for name in (
        "inspection",
        "inference",
        "log.txt",
        "metrics.json",
        "results.json",
        "config.yaml",
        "findings.json",
        "last_checkpoint",
        "run.lock",
        ".lock",
    ):

        def link(folder: Path, name: str = name) -> None:
            target = folder.parent / "user's own"
            target.mkdir(exist_ok=True)
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                os.rename(path, folder / "away")
            path.unlink(missing_ok=True)
            path.symlink_to(target / name)

        yield f"{name} is a link", link
