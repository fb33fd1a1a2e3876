"""Where a run's models are: in this process or in a Ray session, on GPUs or on CPUs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rich.console import Console

from blocksight.cluster.cores import usable_cores, usable_gpus
from blocksight.cluster.errors import ClusterError
from blocksight.cluster.sizing import Device, Sizing
from blocksight.jobs.plan.config import Execution
from blocksight.jobs.plan.context import let_import_from
from blocksight.jobs.plan.text import counted, printable
from blocksight.jobs.plan.units import Workforce


def session_of(
    execution: Execution, tell: Callable[[str], None] | None = None
) -> AbstractContextManager[Sizing | None]:
    """Starts or joins Ray and yields the job's sizing; None for a run in this process.

    `tell` shows what has joined while the job waits for a cluster; without it the job does not wait.
    """
    if execution.runner == "local":
        return nullcontext()
    from blocksight.cluster.session import Waiting, ray_session

    waits = execution.wait > 0 and tell is not None
    waiting = Waiting(execution.wait, execution.min_workers, tell) if waits and tell is not None else None
    return ray_session(execution.address, execution.workers, execution.device, waiting, execution.py_modules)


def workforce_of(execution: Execution) -> Workforce:
    """The workers that a new plan expects: those of the cluster, which is joined to ask it, or of this machine.

    With --wait they may still be coming: those that are asked for are expected. Raises ClusterError.
    """
    if execution.wait:
        return Workforce(execution.workers or execution.min_workers, on_gpu=execution.device == "gpu")
    if execution.runner == "ray" and execution.address is not None:
        with session_of(execution) as sizing:
            assert sizing is not None  # of Ray
            return Workforce(sizing.num_actors, sizing.gpus_per_actor > 0)
    refuse_missing_gpu(execution)
    if execution.runner == "local":
        on_gpu = device_of(execution, None) == "cuda"
        return Workforce(1 if on_gpu else execution.workers or usable_cores(), on_gpu)
    gpus = 0 if execution.device == "cpu" else usable_gpus()
    return Workforce(execution.workers or gpus or usable_cores(), on_gpu=gpus > 0)


def let_import_modules(execution: Execution) -> None:
    """Makes the packages of --py-modules importable here, as they are on the workers. Raises ClusterError."""
    for folder in map(Path, execution.py_modules):
        if not folder.is_dir():
            raise ClusterError(f"--py-modules: {str(folder)!r} is no folder; wanted the folder of a Python package")
        let_import_from(str(folder.resolve().parent))


def refuse_missing_gpu(execution: Execution) -> None:
    """Raises ClusterError if a GPU of this machine is asked for, and there is none. A cluster is asked when joined."""
    is_elsewhere = execution.runner == "ray" and execution.address is not None
    if execution.device == "gpu" and not is_elsewhere:
        device_here("gpu")


def device_here(asked: Device) -> str:
    """`cuda` or `cpu`: what torch computes on in this process.

    A GPU that the driver lists is not enough: torch must be able to use it. Raises ClusterError if a GPU is asked for.
    """
    if asked == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "gpu":
        raise ClusterError(
            f"--device gpu: this machine shows no NVIDIA GPU that torch {torch.__version__} can use: check that "
            "nvidia-smi lists one and that this torch is a CUDA build, or choose --device cpu"
        )
    return "cpu"


def device_of(execution: Execution, sizing: Sizing | None) -> str:
    """`cuda` or `cpu`: where the models of a run are. `sizing`: of its Ray session; None: it runs in this process."""
    if sizing is not None:
        return "cuda" if sizing.gpus_per_actor > 0 else "cpu"
    return device_here(execution.device)


def workers_text(execution: Execution, sizing: Sizing | None) -> str:
    """Who explains, and on what, for people."""
    on_gpu = device_of(execution, sizing) == "cuda"
    if sizing is None:
        return f"this process, on {'a GPU' if on_gpu else 'the CPU'}"
    where = "a GPU each" if on_gpu else "a CPU core each"
    missing = "" if on_gpu or execution.device == "cpu" else "; the Ray session has no GPU"
    idle = (
        f"; {counted(sizing.idle_gpus, 'GPU')} without work, as the nodes have too few CPUs" if sizing.idle_gpus else ""
    )
    most = f"up to {execution.workers}" if execution.workers else "more"
    grows = f"; {most} as nodes join" if sizing.most_actors is not None else ""
    return f"{counted(sizing.num_actors, 'explain actor')}, {where}{missing}{idle}{grows}"


def tell_of(console: Console) -> Callable[[str], None]:
    """Shows one line of what Ray says, as text."""
    return lambda line: console.print(printable(line))


def check_gpu(sizing: Sizing | None) -> None:
    """Tries a GPU of the Ray session, if the job needs one. Raises ClusterError."""
    if sizing is not None and sizing.gpus_per_actor > 0:
        from blocksight.jobs.run import pipeline

        pipeline.check_gpu(sizing)
