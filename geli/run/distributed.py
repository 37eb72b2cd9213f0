"""Devices, number types, seeds, and the processes of a run."""

import math
import os
import platform
import random
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from geli.run.console import is_main_process
from geli.run.errors import UserError
from geli.run.sharding import check_sharding


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch, and selects deterministic algorithms (otherwise some gradients, such as that of
    indexing, are summed in an order that depends on the threads)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this setting
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time


def make_accelerator(device: str, dtype: str, cpu_dtype: str = "auto") -> Accelerator:
    """The `Accelerator` of a run.

    Args:
        device: auto (a GPU if there is one), cpu, cuda or mps.
        dtype: of forward and backward passes; weights stay float32. bfloat16, float32, or auto: bfloat16 where the
            hardware computes in it.
        cpu_dtype: what auto means on a CPU.

    Raises a `UserError` if the device is not available, or accelerate's configuration is refused (`check_sharding`).
    """
    bfloat16 = uses_bfloat16(device, dtype, cpu_dtype)
    check_sharding()
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16" if bfloat16 else "no")
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (stays open until the process ends)
    return accelerator


def uses_bfloat16(device: str, dtype: str, cpu_dtype: str = "auto") -> bool:
    """Whether forward passes are computed in bfloat16; arguments and errors as of `make_accelerator`."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True, "auto": True}
    if not available[device]:
        raise UserError(f"--device {device}: this machine has none that torch can use; try --device auto")
    if dtype == "auto" and (device == "cpu" or not (available["cuda"] or available["mps"])):
        dtype = cpu_dtype
    return dtype == "bfloat16" or (dtype == "auto" and _computes_in_bfloat16(device))


def local_device(device: str) -> torch.device:
    """The device that `device` means in this process, one of those that `accelerate launch` may have started."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if device in ("auto", "mps") and torch.backends.mps.is_available() else "cpu")


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """The type of weights that are not trained: bfloat16 on a GPU that computes in it, else float32."""
    half = accelerator.mixed_precision == "bf16" and accelerator.device.type == "cuda"
    return torch.bfloat16 if half else torch.float32


def _computes_in_bfloat16(device: str) -> bool:
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    try:
        return device in ("auto", "cpu") and "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def local_part(items, accelerator: Accelerator):
    """This process' contiguous part of a list or tensor that every process has; it may be empty."""
    with accelerator.split_between_processes(items) as mine:
        return mine


def gather_parts(mine: list, accelerator: Accelerator) -> list:
    """The whole list, in its order, from every process' `local_part` of it."""
    return gather_object(mine) if accelerator.num_processes > 1 else mine


def device_name(device: torch.device) -> str:
    """The name of the hardware, which is part of the key of cached features: the last digits may depend on it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


def available_memory() -> float:
    """Bytes of memory that this process may use at most: the machine's, or less where a container allows less. What is
    in use does not count."""
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), container_memory())


def container_memory(own: Path = Path("/proc/self/cgroup"), groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that the control groups of this process allow (a container's or a batch job's, in the files of Linux'
    cgroup v2 or v1); infinite without a limit.

    Args:
        own: the file that lists the process' groups. groups: where the files of all groups are.
    """
    limits = [math.inf]
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        top, name = (groups / "memory", "memory.limit_in_bytes") if controllers else (groups, "memory.max")
        if controllers and "memory" not in controllers.split(","):
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):  # a limit holds for the groups inside a group too
            with suppress(OSError, ValueError):  # no such file, or "max"
                limits.append(int((folder / name).read_text()))
    return min(limits)


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
