"""Pre-training as a self-requeueing Slurm job, submitted by submitit (the extra ``slurm``)."""

from __future__ import annotations

import ast
import os
import signal
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from fvcore.common.config import CfgNode

from moco_common.errors import UserError
from moco_common.stopping import Stopped
from moco_common.text import counted
from pretrain.checkpoint import format as checkpoint
from pretrain.engine.train_loop import start
from pretrain.methods.automatic import AUTO

# Settings that submitit accepts for every cluster type; all others are specific to one.
_COMMON = (
    "name timeout_min mem_gb nodes cpus_per_task gpus_per_node tasks_per_node stderr_to_stdout"
).split()
_PREEMPTED = signal.SIGUSR2  # sent by Slurm, on submitit's request, at time limit and preemption
_MOST_TIMEOUTS = 1000  # number of time limits after which a job is no longer requeued


def submit(
    cfg: CfgNode, settings: Sequence[str], *, resume: bool = False, quiet: bool = False
) -> str:
    """Submit the run; return a sentence with the job's number and log folder.

    Each GPU gets one task, which is one rank. When the job reaches its time limit, is preempted or
    loses a node, it is requeued and resumes from its last checkpoint.

    Args:
        cfg: config of the run; its output folder must be visible to all nodes, and receives the
            logs.
        settings: ``KEY=VALUE``: ``partition``, ``nodes``, ``gpus_per_node``, ``timeout_min``,
            ``mem_gb``, ``account``, ``qos``, ``constraint`` and others that submitit accepts;
            ``signal_delay_s`` is the notice before the time limit. ``cluster=local`` runs the tasks
            on this machine instead, for testing.
        resume: allow the output folder to contain a run.

    Raises:
        UserError: submitit or Slurm is missing, a setting is unknown, the batch cannot be divided
            among the ranks, or Slurm rejects the job.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--slurm needs submitit: pip install 'moco-det[slurm]'.") from None
    chosen = _parse(settings)
    cluster = chosen.pop("cluster", "slurm")
    folder = Path(cfg.OUTPUT_DIR).absolute()
    if not resume and checkpoint.candidates(folder):
        raise UserError(
            f"{folder} already contains a run: pass --resume to continue it, or choose another "
            f"--output-dir."
        )
    chosen.setdefault("name", folder.name)
    chosen.setdefault("nodes", 1)
    chosen.setdefault("tasks_per_node", chosen.get("gpus_per_node") or 1)
    workers = cfg.DATALOADER.NUM_WORKERS
    chosen.setdefault("cpus_per_task", (4 if workers == AUTO else workers) + 1)
    for key in ("nodes", "tasks_per_node"):
        if not isinstance(chosen[key], int) or chosen[key] < 1:
            raise UserError(f"--slurm {key}={chosen[key]}: give a whole number of at least 1.")
    ranks = chosen["nodes"] * chosen["tasks_per_node"]
    if cfg.SOLVER.BATCH_SIZE % ranks:
        raise UserError(
            f"SOLVER.BATCH_SIZE {cfg.SOLVER.BATCH_SIZE} cannot be divided among the {ranks} tasks "
            f"of --slurm: choose a multiple of {ranks}."
        )
    if cluster == "slurm":
        # Slurm requeues the job if a node fails. Since 22.05, srun does not inherit the CPUs of a
        # task.
        chosen.setdefault("additional_parameters", {"requeue": True})
        chosen.setdefault("srun_args", [f"--cpus-per-task={chosen['cpus_per_task']}"])
        chosen.setdefault("setup", [f"export PYTHONPATH={Path(__file__).parents[2]}:$PYTHONPATH"])
    try:
        executor = submitit.AutoExecutor(
            folder / "slurm", cluster=cluster, **{f"{cluster}_max_num_timeout": _MOST_TIMEOUTS}
        )
        executor.update_parameters(
            **{k if k in _COMMON else f"{cluster}_{k}": value for k, value in chosen.items()}
        )
        cfg = cfg.clone()
        cfg.OUTPUT_DIR = str(folder)
        job = executor.submit(Job(cfg.dump(), quiet))
    except (NameError, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"--slurm {' '.join(settings)}: {_first_line(error)}.") from None
    except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"The job could not be submitted: {_first_line(error)}.") from None
    where = f"{counted(ranks, 'rank')}; its output is in {job.paths.folder}"
    return f"submitted job {job.job_id} on {where}"


class Job:
    """One task of the job: one rank of a run, resumed from the last checkpoint.

    On the signal before the time limit or at preemption, all ranks save the current step, and rank
    0 has submitit requeue the job. A plain SIGTERM (``scancel``) also saves, and ends the job.
    """

    def __init__(self, config: str, quiet: bool) -> None:
        self.config, self.quiet = config, quiet
        self.preempted = False

    def __call__(self) -> None:
        import submitit

        task = submitit.JobEnvironment()
        os.environ.update(
            MASTER_ADDR=task.hostnames[0] if task.num_nodes > 1 else "127.0.0.1",
            MASTER_PORT=str(20000 + zlib.crc32(task.job_id.encode()) % 10000),
            WORLD_SIZE=str(task.num_tasks),
            RANK=str(task.global_rank),
            LOCAL_RANK=str(task.local_rank),
        )
        requeue: Any = signal.getsignal(_PREEMPTED)  # submitit's
        idle = signal.getsignal(signal.SIGTERM)

        def stop(number: int, frame: FrameType | None) -> None:
            self.preempted = True
            if signal.getsignal(signal.SIGTERM) is idle:
                requeue(number, frame)  # training has not started: there is nothing to save
            else:
                signal.raise_signal(signal.SIGTERM)

        signal.signal(_PREEMPTED, stop)
        try:
            start(CfgNode.load_cfg(self.config), resume=True, quiet=self.quiet)
        except Stopped as stopped:
            if not self.preempted:
                sys.exit(stopped.exit_status)
            requeue(_PREEMPTED, None)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    def checkpoint(self) -> Any:
        """Return the job that the next start runs; called by submitit before it requeues."""
        import submitit

        return submitit.helpers.DelayedSubmission(Job(self.config, self.quiet))


def _parse(settings: Sequence[str]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not (key.isidentifier() and equals and text):
            raise UserError(
                f"--slurm takes KEY=VALUE settings such as partition=gpu nodes=2 gpus_per_node=8 "
                f"timeout_min=1440, not '{setting}'."
            )
        try:
            chosen[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            chosen[key] = text
    return chosen


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".?!")
