"""YAML files that name code, expand, nest, or hold values of other kinds than their keys."""

from collections.abc import Iterator
from pathlib import Path

Case = tuple[str, dict[str, str]]  # the files by name; the first is the one that is opened
MAIN = "hostile.yaml"

_TAGS = (
    *("!!python/object/apply:os.system ['touch {proof}']", "!!python/name:os.system"),
    *("!!python/object/new:os.system ['touch {proof}']", "!!python/module:antigravity"),
    *("!!python/object:argparse.Namespace {{a: 1}}", "!!python/tuple [1, 2]"),
    "!!python/object/apply:builtins.eval [\"open('{proof}', 'w')\"]",
    "!!python/object/apply:subprocess.Popen [[touch, '{proof}']]",
    "!!python/object/new:type {{args: [X, !!python/tuple [], {{}}]}}",
    "!!python/object/new:str {{state: !!python/tuple [1, {{a: 1}}]}}",
    "!!python/object/new:list {{listitems: !!python/object/apply:os.system ['touch {proof}']}}",
    "!!python/object/apply:builtins.getattr [!!python/module:os, system]",
    *("!!python/long 1", "!!python/complex 1j", "!!python/bytes YQ==", "!!python/unicode x"),
    *("!!python/str x", "!!python/bool true", "!!python/none ''", "!!python/dict {{}}"),
    *("!!binary 'not base64!'", "!!timestamp 2024-99-99", "!!int x", "!!float x", "!!bool x"),
    *("!!set {{a, a}}", "!!omap [1]", "!!pairs [1]", "!evil x", "!<tag:evil> x", "!!null x"),
)
_VALUES = {
    "nothing": "null",
    "yes": "true",
    "a negative number": "-1",
    "2^63": "9223372036854775808",
    "10^300": "1" + "0" * 300,
    "10^900": "1" + "0" * 900,
    "5,000 digits": "9" * 5000,
    "100,000 digits in base 60": "1" + ":59" * 30_000,
    "hexadecimal": "0x" + "f" * 200_000,
    "binary": "0b" + "1" * 200_000,
    "1e400": "1e400",
    "infinity": ".inf",
    "NaN": ".nan",
    "a date": "2024-01-01",
    "text": "'x'",
    "no text": "''",
    "100,000 letters": "x" * 100_000,
    "control characters": '"\\e[31m\\n\\0x"',
    "a list": "[1, 2]",
    "an empty list": "[]",
    "a list of lists": "[[[[1]]]]",
    "a mapping": "{a: 1}",
    "an empty mapping": "{}",
    "a path upwards": "'../../../../etc/passwd'",
    "a device": "/dev/zero",
    "a number with a fraction": "0.5",
}
PRETRAIN_KEYS = (
    *("METHOD", "SEED", "DATA", "OUTPUT_DIR", "MODEL", "MODEL.DEPTH", "MODEL.WIDTH"),
    *("MODEL.BN_GROUPS", "INPUT.CROP_SIZE", "INPUT.VIEWS", "MOCO.QUEUE_SIZE", "MOCO.DIM"),
    *("MOCO.TEMPERATURE", "SOLVER.BATCH_SIZE", "SOLVER.BASE_LR", "SOLVER.EPOCHS"),
    *("SOLVER.MAX_ITER", "LOG.PERIOD", "CHECKPOINT.PERIOD", "DATALOADER.NUM_WORKERS"),
)
DETECTION_KEYS = (
    *("VERSION", "PROTOCOL", "SEED", "OUTPUT_DIR", "MODEL", "MODEL.WEIGHTS", "MODEL.DEVICE"),
    *("MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME", "MODEL.PIXEL_MEAN", "_BASE_"),
    *("MODEL.RESNETS.DEPTH", "MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ARCHITECTURE_FROM"),
    *("DATASETS.TRAIN", "DATASETS.TEST", "DATASETS.CLASSES", "DATALOADER.NUM_WORKERS"),
    *("SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.BASE_LR", "SOLVER.IMS_PER_BATCH"),
    *("INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TEST", "INPUT.FORMAT", "TEST.EVAL_PERIOD"),
)
_DISHONEST = ("MODEL.LOAD_PROPOSALS: true", "MODEL.WEIGHTS: http://127.0.0.1:9/x.pkl")


def line(key: str, value: str) -> str:
    """``A.B`` and a value, as YAML in braces."""
    parts = key.split(".")
    return (
        "".join(f"{part}: {{" for part in parts[:-1])
        + f"{parts[-1]}: {value}"
        + "}" * (len(parts) - 1)
    )


def texts(proof: Path) -> Iterator[tuple[str, str]]:
    """YAML that is hostile whatever reads it."""
    for tag in _TAGS:
        value = tag.format(proof=proof)
        yield f"{tag:.50}", f"SEED: {value}\n"
    yield "a tag at the top", f"!!python/object/apply:os.system ['touch {proof}']\n"
    yield "a tag as a key", f"? !!python/object/apply:os.system ['touch {proof}']\n: 1\n"
    nine = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    yield "aliases of aliases", f"a0: &a0 [x, x, x, x, x, x, x, x, x]\n{nine}SEED: *a11\n"
    merges = "".join(
        f"m{i}: &m{i}\n  <<: [{', '.join([f'*m{i - 1}'] * 9)}]\n  k{i}: 1\n" for i in range(1, 12)
    )
    yield "merges of merges", f"m0: &m0 {{a: 1}}\n{merges}SOLVER: {{<<: *m11}}\n"
    yield "an alias inside itself", "SEED: &a [*a]\n"
    yield "a mapping inside itself", "SOLVER: &a {SEED: *a}\n"
    yield "a merge of itself", "SOLVER: &a {<<: *a}\n"
    yield "a merge of a number", "SOLVER: {<<: 7}\n"
    yield "a merge of a list of numbers", "SOLVER: {<<: [7]}\n"
    yield "an unknown alias", "SEED: *nothing\n"
    yield "50,000 open lists", "SEED: " + "[" * 50_000
    yield "50,000 open mappings", "SEED: " + "{a: " * 50_000
    yield "deep by indentation", "".join(" " * i + f"a{i}:\n" for i in range(1200))
    yield "deep by hyphens", "- " * 50_000 + "x\n"
    yield "200,000 keys", "".join(f"k{i}: 1\n" for i in range(60_000))
    yield "one key twice", "SEED: 1\nSEED: 2\n"
    yield "keys that are no text", "1: 2\nnull: 3\n[1, 2]: 4\n"
    yield "a key that is a mapping", "? {a: 1}\n: 2\n"
    yield "a list", "[1, 2]\n"
    yield "text", "just words\n"
    yield "nothing", ""
    yield "two documents", "SEED: 1\n---\nSEED: 2\n"
    yield "tabs", "SOLVER:\n\tSEED: 1\n"
    yield "a directive", "%YAML 9.9\n---\nSEED: 1\n"
    yield "an open quote", "SEED: 'x\n"
    yield "2 MB of text", "NOTE: " + "x" * 2_000_000 + "\n"
    yield "2 MB of comment", "#" + "x" * 2_000_000 + "\n"
    yield "a control character", "SEED: \x01\n"
    yield "an unpaired surrogate", 'SEED: "\\ud800"\n'
    yield "a colon of colons", ": : : :\n"
    yield "a long key", "k" * 100_000 + ": 1\n"


def pretraining(proof: Path) -> Iterator[Case]:
    """Recipes."""
    for name, text in texts(proof):
        yield name, {MAIN: text}
    for key in PRETRAIN_KEYS:
        for name, value in _VALUES.items():
            yield f"{key} is {name}", {MAIN: line(key, value) + "\n"}


def detection(proof: Path) -> Iterator[Case]:
    """Protocols and bases."""
    for name, text in texts(proof):
        yield name, {MAIN: text}
    for key in DETECTION_KEYS:
        for name, value in _VALUES.items():
            yield f"{key} is {name}", {MAIN: line(key, value) + "\n"}
    for entry in _DISHONEST:
        key, _, value = entry.partition(": ")
        yield entry, {MAIN: line(key, value) + "\n"}
    doubling = {MAIN: "_BASE_: [b0.yaml, b0.yaml]\n"}
    for i in range(18):
        doubling[f"b{i}.yaml"] = f"_BASE_: [b{i + 1}.yaml, b{i + 1}.yaml]\nSEED: {i}\n"
    yield "bases that double", doubling | {"b18.yaml": "SEED: 1\n"}
    long = {MAIN: "_BASE_: b0.yaml\n"}
    long |= {f"b{i}.yaml": f"_BASE_: b{i + 1}.yaml\n" for i in range(500)}
    yield "a chain of 500 bases", long | {"b500.yaml": "SEED: 1\n"}
    yield "a base of itself", {MAIN: f"_BASE_: {MAIN}\n"}
    yield "a base that is a device", {MAIN: "_BASE_: /dev/zero\n", "x.yaml": ""}
    yield "a base elsewhere", {MAIN: "_BASE_: ../../../../../../../../etc/passwd.yaml\n"}
    yield "20,000 bases", {MAIN: "_BASE_: [" + "VOC, " * 20_000 + "VOC]\n"}
    wide = {f"w{i}.yaml": "MODEL: {WEIGHTS: " + "x" * 10_000 + "}\n" for i in range(50)}
    names = ", ".join(list(wide) * 40)
    yield "2,000 bases of 50 files", {MAIN: f"_BASE_: [{names}]\n"} | wide
