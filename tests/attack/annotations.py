"""Annotation files that nest, expand, or hold values of other kinds than their fields."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.attack.pictures import special_files

Write = Callable[[Path], object]
Case = tuple[str, Write]
VALUES: dict[str, Any] = {
    "nothing": None,
    "true": True,
    "-1": -1,
    "2^63": 2**63,
    "10^400": 10**400,
    "1e308": 1e308,
    "infinity": math.inf,
    "NaN": math.nan,
    "text": "x",
    "no text": "",
    "a path upwards": "../../../../../../etc/passwd",
    "a device": "/dev/zero",
    "a null byte": "a\0b",
    "a surrogate": "\ud800",
    "a list": [1, 2],
    "a long list": [0] * 100_000,
    "an empty list": [],
    "a list of lists": [[[[1]]]],
    "a mapping": {"a": 1},
    "run lengths that claim 2^60": {"size": [1 << 30, 1 << 30], "counts": [0, 1 << 60]},
    "run lengths of noise": {"size": [64, 64], "counts": "\x7f" * 5_000},
    "run lengths below zero": {"size": [64, 64], "counts": [-5, 10, -5]},
    "run lengths of size -1": {"size": [-1, 64], "counts": "0"},
    "10^6 points": [[1.0, 2.0] * 100_000],
    "a polygon of huge numbers": [[1e300, -1e300, 1e300, 1e300, -1e300, 1e300]],
}
_TOP = ("images", "annotations", "categories")
_FIELDS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": (
        "id",
        "image_id",
        "category_id",
        "bbox",
        "area",
        "iscrowd",
        "segmentation",
        "keypoints",
        "num_keypoints",
    ),
    "categories": ("id", "name", "supercategory", "keypoints", "skeleton"),
}


def _text(content: str | bytes) -> Write:
    data = content if isinstance(content, bytes) else content.encode(errors="surrogatepass")
    return lambda path: path.write_bytes(data)


def coco(content: dict[str, Any]) -> Iterator[Case]:
    """Changes of an honest COCO file."""
    yield from _json_files(json.dumps(content))
    for part in _TOP:
        for name, value in VALUES.items():
            yield f"{part} is {name}", _text(json.dumps({**content, part: value}))
        yield f"no {part}", _text(json.dumps({k: v for k, v in content.items() if k != part}))
        for field in _FIELDS[part]:
            for name, value in VALUES.items():
                changed = copy.deepcopy(content)
                changed[part][0][field] = value
                yield f"{field} of {part} is {name}", _text(json.dumps(changed))
    first = content["annotations"][0]
    yield (
        "50,000 annotations of one image",
        _text(json.dumps({**content, "annotations": [{**first, "id": i} for i in range(50_000)]})),
    )
    yield (
        "50,000 categories",
        _text(
            json.dumps(
                {**content, "categories": [{"id": i, "name": f"c{i}"} for i in range(50_000)]}
            )
        ),
    )


def _json_files(honest: str) -> Iterator[Case]:
    yield "JSON that is cut", _text(honest[: len(honest) // 2])
    for opening, name in (("[", "lists"), ('{"a":', "mappings")):
        for depth in (1_000, 100_000, 5_000_000 // len(opening)):
            yield f"{depth} open {name}", _text(opening * depth)
            yield f"{depth} open {name} inside", _text('{"images": ' + opening * depth)
    yield "an integer of 100,000 digits", _text('{"images": ' + "9" * 100_000 + "}")
    yield "a number with a huge exponent", _text('{"images": 1e999999999}')
    yield "NaN at the top", _text("NaN")
    yield "no text", _text("")
    yield "UTF-16", _text(honest.encode("utf-16"))
    yield "noise", _text(bytes(range(256)) * 20)
    yield "one key twice", _text('{"images": [], ' + honest[1:])
    yield "a long text", _text('{"images": "' + "x" * 30_000_000 + '"}')
    yield "a list of numbers", _text("[1, 2]")
    for name, write in special_files():
        yield name, write


def voc(honest: str) -> Iterator[Case]:
    """Changes of an honest XML file."""
    lol = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    body = honest[honest.index("<annotation>") + len("<annotation>") :]
    entity = f'<!DOCTYPE x [<!ENTITY l0 "lollollol">{lol}]>'
    yield "a billion laughs", _text(f"{entity}<annotation><a>&l9;</a>{body}")
    name = honest.replace("<name>", "<name>&l9;", 1)
    yield "a billion laughs in a name", _text(entity + name)
    big = f'<!DOCTYPE x [<!ENTITY a "{"x" * 100_000}">]>'
    yield "quadratic entities", _text(f"{big}<annotation><a>{'&a;' * 20_000}</a>{body}")
    for target in ("file:///etc/passwd", "http://127.0.0.1:9/", "/dev/zero"):
        outside = f'<!DOCTYPE x [<!ENTITY a SYSTEM "{target}">]>'
        yield f"an entity from {target}", _text(outside + honest.replace("<name>", "<name>&a;", 1))
        yield f"a DTD from {target}", _text(f'<!DOCTYPE x SYSTEM "{target}">' + honest)
    parameter = '<!DOCTYPE x [<!ENTITY % a SYSTEM "file:///etc/passwd"> %a;]>'
    yield "a parameter entity", _text(parameter + honest)
    yield (
        "an entity inside itself",
        _text('<!DOCTYPE x [<!ENTITY a "&a;">]><annotation>&a;</annotation>'),
    )
    yield "200,000 open tags", _text("<a>" * 200_000)
    yield "200,000 nested tags", _text("<a>" * 200_000 + "</a>" * 200_000)
    yield (
        "a tag with 100,000 attributes",
        _text("<annotation " + " ".join(f'a{i}="1"' for i in range(100_000)) + "/>"),
    )
    yield "an attribute of 10 MB", _text(f'<annotation a="{"x" * 10_000_000}"/>')
    yield "cut", _text(honest[: len(honest) // 2])
    yield "nothing", _text("")
    yield "UTF-16", _text(honest.encode("utf-16"))
    yield "an unknown encoding", _text('<?xml version="1.0" encoding="evil"?>' + honest)
    yield "UTF-7", _text('<?xml version="1.0" encoding="utf-7"?>' + honest)
    yield "noise", _text(bytes(range(256)) * 20)
    yield (
        "50,000 objects",
        _text(
            honest.replace(
                "</annotation>", "<object><name>a</name></object>" * 50_000 + "</annotation>"
            )
        ),
    )
    for tag in ("width", "height", "depth", "name", "difficult", "xmin", "ymax", "filename"):
        if f"<{tag}>" not in honest:
            continue
        start, _, rest = honest.partition(f"<{tag}>")
        tail = rest[rest.index(f"</{tag}>") :]
        for value in (
            "",
            "-1",
            "1e999",
            "nan",
            "inf",
            "9" * 10_000,
            "x" * 1_000_000,
            "0x10",
            "1_0",
            "../../../etc/passwd",
            "/dev/zero",
            "<a/>",
            "&#x10FFFF;",
            "\u0663",
        ):
            yield f"{tag} is {value[:20]!r}", _text(f"{start}<{tag}>{value}{tail}")
    for name, write in special_files():
        yield name, write


def yolo_labels() -> Iterator[Case]:
    """Label files."""
    for line in (
        "0 0.5 0.5 0.2 0.2",
        "",
        "x",
        "0",
        "0 1",
        "-1 0.5 0.5 0.2 0.2",
        "nan nan nan nan nan",
        "0 inf 0.5 0.2 0.2",
        "0 1e308 0.5 1e308 0.2",
        "0 -1 -1 -1 -1",
        "9" * 5_000 + " 1 1 1 1",
        "99999999999 0.5 0.5 0.2 0.2",
        "0.5 0.5 0.5 0.2 0.2",
        "0 0.5 0.5 0.2 0.2 extra",
        "0 " + "0.5 " * 200_000,
        "1_0 0.5 0.5 0.2 0.2",
        "٣ 0.5 0.5 0.2 0.2",
        "\x00 0 0 0 0",
        "1e3 .5 .5 .2 .2",
        "0x1 0.5 0.5 0.2 0.2",
    ):
        yield f"labels {line[:24]!r}", _text(line + "\n")
    yield "200,000 labels", _text("0 0.5 0.5 0.2 0.2\n" * 200_000)
    yield "a line of 20 MB", _text("0 " * 10_000_000)
    yield "noise", _text(bytes(range(256)) * 100)
    for name, write in special_files():
        yield f"labels: {name}", write


def yolo_descriptions(proof: Path) -> Iterator[Case]:
    """Files ``data.yaml``."""
    from tests.attack.configs import _VALUES, texts

    for name, text in texts(proof):
        yield f"data.yaml: {name}", _text(text + "\ntrain: images/train\nnames: [a, b]\n")
        yield f"data.yaml alone: {name}", _text(text)
    for key in ("path", "train", "val", "nc", "names", "kpt_shape", "download"):
        for name, value in _VALUES.items():
            yield f"data.yaml: {key} is {name}", _text(f"names: [a, b]\nnc: 2\n{key}: {value}\n")
    yield "data.yaml: download", _text(f"names: [a, b]\ndownload: touch {proof}\n")
    yield (
        "data.yaml: download in Python",
        _text(f"names: [a, b]\ndownload: |\n  open('{proof}','w')\n"),
    )
    for name, write in special_files():
        yield f"data.yaml: {name}", write


def lists(folder: Path) -> Iterator[Case]:
    """Lists of paths, as ``.txt`` sources and splits."""
    for line in (
        "",
        "../../../../etc/passwd",
        "/dev/zero",
        "/dev/stdin",
        "\x00",
        "x" * 100_000,
        "é",
        "http://127.0.0.1:9/x.jpg",
        "| touch x",
        "$(touch x)",
        "~root/x",
        "a\tb",
        "#",
    ):
        yield f"a list of {line[:20]!r}", _text(line + "\n")
    yield "a list of 300,000 lines", _text("nothing.jpg\n" * 300_000)
    yield "a list of one line of 20 MB", _text("x" * 20_000_000)
    yield "a list of noise", _text(bytes(range(256)) * 100)
    for name, write in special_files():
        yield f"a list: {name}", write
