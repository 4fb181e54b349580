"""Comparison of a resumed run with its recorded config and training data."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from moco_common.errors import UserError
from moco_det.checkpoint.run_checkpointer import newest_checkpoints
from moco_det.config.defaults import flatten
from moco_det.config.protocols import load_config
from moco_det.data.samplers import TrainingSet

# Keys, or prefixes of keys, that may change when a run is resumed. A changed key of LOGGED, or one
# that ends in _TEST, is logged; keys of FREE are not compared.
LOGGED = (
    *("DATASETS.TRAIN", "DATASETS.TEST", "TEST."),
    *("SOLVER.BASE_LR", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.GAMMA", "SOLVER.NUM_DECAYS"),
    *("SOLVER.LR_SCHEDULER_NAME", "SOLVER.RESCALE_INTERVAL", "SOLVER.WARMUP"),
    *("SOLVER.ACCUMULATION_STEPS", "SOLVER.AMP", "SOLVER.CLIP_GRADIENTS"),
)
FREE = (
    *("VERSION", "SOURCE", "OUTPUT_DIR", "LOG_PERIOD", "VIS_PERIOD", "CUDNN_BENCHMARK"),
    *("PREFLIGHT", "TRACKERS", "MODEL.DEVICE", "DATASETS.STRICT", "DATALOADER.NUM_WORKERS"),
    *("SOLVER.CHECKPOINT_PERIOD", "SOLVER.CHANNELS_LAST", "SOLVER.REFERENCE_WORLD_SIZE"),
)
_FILES = ("MODEL.WEIGHTS", "MODEL.ARCHITECTURE_FROM")  # compared as paths


MUST_NOT = "cannot be changed"
MAY_AND_IS_LOGGED = "can be changed; the change is logged"
MAY = "can be changed"


def may_change(key: str) -> str:
    """Return one of the three texts above: the rule for changing a key when a run is resumed."""
    if key in FREE:
        return MAY
    return MAY_AND_IS_LOGGED if key.startswith(LOGGED) or key.endswith("_TEST") else MUST_NOT


def compare_config(cfg: CfgNode) -> list[str]:
    """Return ``KEY OLD -> NEW`` for each setting that has changed and may.

    Args:
        cfg: the resolved config of a run to resume in its ``OUTPUT_DIR``. Without a checkpoint
            there, the run starts from the beginning and nothing is compared.

    Raises:
        UserError: a setting has changed that must not; the message names all of them.
    """
    recorded = Path(cfg.OUTPUT_DIR, "config.yaml")
    if not newest_checkpoints(cfg.OUTPUT_DIR) or not recorded.is_file():
        return []
    before, now = flatten(load_config(str(recorded))), flatten(cfg)
    logged, refused = [], []
    for key in sorted(now.keys() - set(FREE)):
        old, new = _comparable(key, before.get(key)), _comparable(key, now[key])
        if old == new:
            continue
        if may_change(key) == MAY_AND_IS_LOGGED:
            logged.append(f"{key} {before.get(key)} -> {now[key]}")
        else:
            refused.append(f"{key} was {before.get(key)!r} and is now {now[key]!r}")
    if refused:
        raise UserError(
            f"{cfg.OUTPUT_DIR} holds a run with settings that cannot change on resume: "
            f"{'; '.join(refused)}. Use the run's settings or another --output-dir."
        )
    return logged


def _comparable(key: str, value: Any) -> Any:
    if key in _FILES and value:
        return os.path.abspath(os.path.expanduser(value))
    return [_comparable("", part) for part in value] if isinstance(value, (list, tuple)) else value


def fingerprint(training_set: TrainingSet) -> dict[str, int | str]:
    """Summarise a training set for checkpoints: its size, and digests that reveal a change."""
    names = "\n".join(Path(image["file_name"]).name for image in training_set.images)
    sizes = b"" if training_set.sizes is None else training_set.sizes.tobytes()
    parts = {"names": names.encode(), "sizes": sizes, "objects": training_set.objects.tobytes()}
    digests = {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}
    return {"images": len(training_set.images), **digests}


def fingerprint_of_test_set(name: str) -> dict[str, int | str]:
    """Summarise a registered test set likewise."""
    records = DatasetCatalog.get(name)
    names = "\n".join(Path(record["file_name"]).name for record in records)
    objects = ",".join(str(len(record.get("annotations", ()))) for record in records)
    sizes = ",".join(f"{record.get('width')}x{record.get('height')}" for record in records)
    parts = {"names": names, "sizes": sizes, "objects": objects}
    digests = {part: hashlib.sha256(text.encode()).hexdigest() for part, text in parts.items()}
    return {"dataset": name, "images": len(records), **digests}


def changes_of_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe the difference between two fingerprints; return "" if there is none."""
    if before["images"] != now["images"]:
        return f"{now['images']} images instead of {before['images']}"
    texts = {
        "names": "different file names, or a different order",
        "sizes": "different image sizes",
        "objects": "different numbers of objects",
    }
    return ", ".join(text for name, text in texts.items() if before[name] != now[name])
