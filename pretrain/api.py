"""The command line ``moco-pretrain`` as a function."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from moco_common.errors import UserError
from moco_common.files import check_exists
from pretrain.config.defaults import load_config
from pretrain.engine import train_loop


def train(
    recipe: str | Path,
    *,
    data: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    settings: Mapping[str, object] | None = None,
    num_gpus: int = 1,
    resume: bool = False,
    quiet: bool = False,
) -> Path:
    """Pre-train a ResNet on photographs.

    With several processes, call it below ``if __name__ == "__main__":``, because they import the
    calling program again.

    Args:
        recipe: name of a recipe, such as "moco-v2", or a YAML file.
        data: a folder, a .txt list, "coco:JSON:IMAGES" or "shards:URL", or several of these.
        output_dir: directory of the run.
        settings: configuration keys and values, such as ``{"SOLVER.EPOCHS": 100}``.
        num_gpus: number of processes, on GPUs if there are any.
        resume: whether to resume from the last checkpoint.
        quiet: whether to print warnings only.

    Returns:
        The last checkpoint, for ``moco_det.convert``.

    Raises:
        UserError: the input is wrong.
        Stopped: a signal ended the run; its state is saved.
    """
    pairs = [word for key, value in (settings or {}).items() for word in (key, str(value))]
    cfg = load_config(str(recipe), pairs)
    sources = [data] if isinstance(data, str | Path) else data
    if not sources:
        raise UserError("data is empty: name a folder of photographs.")
    for source in sources:
        check_exists(source)
    cfg.DATA, cfg.OUTPUT_DIR = [str(source) for source in sources], str(output_dir)
    train_loop.start(cfg, num_gpus, resume=resume, quiet=quiet)
    return Path(output_dir) / "checkpoint_last.pth"
