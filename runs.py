"""What a run leaves behind: its name, its folders, files that are never half-written, wandb, and the closing table."""

import json
import os
import platform
import random
import re
import secrets
import shutil
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from cli import UserError, file_name

_ADJECTIVES = (
    "amber bold brisk calm clear crisp daring dawn deep eager early fair fleet fond frosty gentle golden grand happy "
    "honest jolly keen kind light lively lucky mellow merry mild neat noble pale patient proud quiet rapid rosy sage "
    "scarlet serene silver smooth solar still sunny swift tidy vivid warm wise young"
).split()
_NOUNS = (
    "aspen bay bird breeze brook canyon cedar cliff cloud comet cove creek dawn dew dream dune ember fern field flower "
    "forest frost garden glade grove harbor hill island lake leaf meadow mist moon morning moss mountain oak ocean "
    "pebble pine plain pond prairie rain reef ridge river sea sky snow sound star stone storm stream sun surf thunder "
    "tree valley violet water wave wind wood"
).split()


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch, and has torch choose algorithms that give the same result every time (the
    gradient of an indexing operation, for one, is else summed in the order in which threads get to it).

    Code that draws for itself takes an explicit generator all the same.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time


def make_accelerator(device: str, dtype: str, cpu_dtype: str = "auto"):
    """The `accelerate.Accelerator` of a run.

    Args:
        device: auto (a GPU when there is one), cpu, cuda or mps.
        dtype: of forward and backward passes (weights stay float32): bfloat16, float32, or auto, which is bfloat16
            where the hardware computes in it.
        cpu_dtype: what auto means on a CPU.

    Raises:
        UserError: for a device that is not there, or a way to spread models that is not known here (see `spread`).
    """
    import torch
    from accelerate import Accelerator

    from sharding import check_spreading

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True, "auto": True}
    if not available[device]:
        raise UserError(f"--device {device}: this machine has none that torch can use; try --device auto")
    if dtype == "auto" and (device == "cpu" or not (available["cuda"] or available["mps"])):
        dtype = cpu_dtype
    bfloat16 = dtype == "bfloat16" or (dtype == "auto" and _computes_in_bfloat16(device))
    check_spreading()
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16" if bfloat16 else "no")
    if not is_writer():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    return accelerator


def frozen_dtype(accelerator):
    """The type of weights that do not train: bfloat16 on a GPU that computes in it, else float32."""
    import torch

    half = accelerator.mixed_precision == "bf16" and accelerator.device.type == "cuda"
    return torch.bfloat16 if half else torch.float32


def _computes_in_bfloat16(device: str) -> bool:
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    try:
        return device in ("auto", "cpu") and "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def is_writer() -> bool:
    """Whether this process is the one, of those that `accelerate launch` started, that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def share(items: Sequence, accelerator) -> Sequence:
    """This process' items of a list that all processes have: every n-th one."""
    return items[accelerator.process_index :: accelerator.num_processes]


def gather_shares(mine: list, accelerator) -> list:
    """The whole list, in its order, from every process' `share` of it (which may be of different lengths)."""
    from accelerate.utils import gather_object

    if accelerator.num_processes == 1:
        return mine
    parts = gather_object([mine])
    whole = [None] * sum(map(len, parts))
    for i, part in enumerate(parts):
        whole[i :: len(parts)] = part
    return whole


def sum_gradients(parameters: Iterable, accelerator) -> float:
    """Adds up the gradients of all processes, where that is not done already (see `sharding.spread`); one that had
    nothing to do adds zeros, so that none waits for it. Returns the norm of the sum."""
    import torch

    from sharding import is_spread

    parameters = list(parameters)
    spread, whole = ([p for p in parameters if is_spread(p) == kind] for kind in (True, False))
    if accelerator.num_processes > 1:
        _sum_gradients(whole, accelerator)
    norm = torch.nn.utils.get_total_norm([p.grad for p in whole if p.grad is not None]).double().cpu() ** 2
    if spread:
        mine = torch.nn.utils.get_total_norm([p.grad.to_local() for p in spread]) ** 2
        norm += accelerator.reduce(mine, "sum").double().cpu()
    return norm.sqrt().item()


def _sum_gradients(parameters: list, accelerator) -> None:
    import torch

    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = torch.cat([p.grad.flatten().to(accelerator.device) for p in parameters])  # what the processes talk over
    total = accelerator.reduce(flat, "sum")
    for p, gradient in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(gradient.view_as(p))


# `.{name}.{token}.tmp{suffix}`: what is not whole yet
TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.tmp(\.\w+)?")


def temporary_name(path: Path) -> Path:
    """A name beside `path` for what is not whole yet, or not wanted any more."""
    return path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp{path.suffix}"


@contextmanager
def atomic_path(path: str | Path, everyone: bool = False) -> Iterator[Path]:
    """Gives a temporary name beside `path` to write to; on success it is on the disk and renamed to `path`, else
    removed. Of several processes only the writer's file stays, unless `everyone`'s does.

    Raises:
        UserError: if it cannot be written, as on a full disk.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with _named_when_it_fails(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if everyone or is_writer():
                _flush(temporary)
                os.replace(temporary, path)
                _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """As `atomic_path`, for a folder; a folder of that name is replaced, in one step where the system can do that."""
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with _named_when_it_fails(path):
            temporary.mkdir(parents=True)
            yield temporary
            if is_writer():
                for written in [*temporary.rglob("*"), temporary]:
                    _flush(written)
                if not path.exists():
                    temporary.rename(path)
                elif not _exchange(temporary, path):
                    old = temporary_name(path)
                    path.rename(old)
                    temporary.rename(path)
                    temporary = old
                _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _named_when_it_fails(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and "os error" not in str(error):  # what libraries written in Rust say
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: could not be written ({reason}); what was there before still is") from None


def _flush(path: Path) -> None:
    """Has the system write a file, or a folder's names, to the disk now, so that a loss of power cannot undo it."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two paths in one step; False where the system cannot (only Linux can)."""
    import ctypes

    call = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def checksum(tensors: dict, text: str = "") -> str:
    """A hash of tensors on the CPU, with their names, shapes and types, and of a text that goes with them."""
    import hashlib

    import torch

    found = hashlib.blake2b(text.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        found.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def private_folder(path: Path) -> None:
    """Makes a folder that only its owner can look into (where the file system has owners)."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(OSError):
        path.chmod(0o700)


def sweep_old(folder: Path) -> None:
    """Removes what runs that were killed a day ago or earlier have left half-written in a folder that many share."""
    for path in folder.glob(".*") if folder.is_dir() else ():
        with suppress(OSError):
            if TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > 24 * 3600:
                path.unlink()


def write_json(path: str | Path, value: object) -> None:
    """Writes strict JSON (no NaN), atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False, default=str) + "\n", encoding="utf-8")


def device_name(device) -> str:
    """What a result's last digits may depend on."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on."""
    packages = "torch transformers tokenizers peft accelerate safetensors numpy pandas scikit-learn wandb".split()
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def new_run_name(folder: Path) -> str:
    """A name of wandb's kind (adjective-noun-number) that no finished run in `folder` has."""
    taken = len(list(folder.glob("reward1_*.json"))) if folder.is_dir() else 0
    while True:
        name = f"{secrets.choice(_ADJECTIVES)}-{secrets.choice(_NOUNS)}-{taken + 1}"
        if not record_path(folder, name).exists():
            return name


def record_path(folder: Path, run_name: str) -> Path:
    """What a finished run of stage 1 or 2 has written last."""
    return folder / f"reward1_{run_name}.json"


def reward_outputs(run_name: str) -> re.Pattern:
    """What the names of the files of a run of stage 1 or 2 look like."""
    return re.compile(rf"(reward1|lang_model|val_turn_rewards|val_returns)_{re.escape(run_name)}(\.json|\.csv|\.png)?")


class Tracker:
    """A wandb run: online when logged in (or `WANDB_MODE=online`), else offline; it never asks and sends no console.

    Args:
        project: wandb's project.
        folder: where outputs go; `wandb/` lies beside it.
        config: what describes the run; no text or id of a conversation.
        run_name: a name to use, or None for wandb's own (offline: one like it, new in `folder`).
        accelerator: `accelerate.Accelerator`; of several processes one tracks, and all know the name.
        claim: a `states.Claim` that the run has already, as one that is resumed; None: one on its name is made here.

    Attributes:
        name: the run's name. claim: the run's hold on its files' names, in the process that writes; None in the others.
        offset: steps that were logged before those that `log` is told (wandb's steps only ever go up).
    """

    def __init__(self, project: str, folder: Path, config: dict, run_name: str | None, accelerator, claim=None):
        from accelerate.utils import broadcast_object_list

        self._run, self.name, self.claim, self.offset = None, "", claim, 0
        if is_writer():
            self._start(project, folder, {**config, "processes": accelerator.num_processes}, run_name)
        self.name = broadcast_object_list([self.name])[0]

    def _start(self, project: str, folder: Path, config: dict, run_name: str | None) -> None:
        import wandb

        from states import claim_run

        folder.mkdir(parents=True, exist_ok=True)
        logs = folder.parent / "wandb"
        if config.get("log_text") or not logs.exists():  # then it may hold conversations
            private_folder(logs)
        mode = os.environ.get("WANDB_MODE") or "online"
        if mode == "online" and not _logged_in():  # wandb would ask for a key
            mode = "offline"
        known = self.claim.description.get("wandb") if self.claim else None  # a run that is resumed
        if known:
            run_name = known["name"]
        elif not self.claim and (run_name or mode != "online"):
            self.claim = claim_run(folder, run_name)
            run_name = self.claim.name
        elif mode != "online":
            run_name = run_name or new_run_name(folder)
        settings = wandb.Settings(
            console="off",  # responses are printed, and conversations do not leave the machine
            disable_git=True,
            save_code=False,
            x_save_requirements=False,
            x_disable_meta=True,  # command line, paths, host and user name
            silent=True,
            init_timeout=30,  # seconds; then the run goes on offline
        )
        shown = {key: _without_folders(value) for key, value in config.items()}
        arguments = dict(project=project, name=run_name, dir=str(folder.parent), config=shown, settings=settings)
        if known:
            arguments |= dict(id=known["id"], resume="allow")
        try:
            self._run = wandb.init(mode=mode, **arguments)
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            print(f"wandb: no connection ({first_line(error)}); this run is logged offline")
            arguments["name"] = run_name or new_run_name(folder)
            self._run = wandb.init(mode="offline", **arguments)
        try:
            self.name = run_name or file_name(self._run.name or "")
        except ArgumentTypeError:  # what WANDB_NAME or the server says is part of paths, and must be a plain name
            self.name = new_run_name(folder)
        if not self.claim:
            self.claim = claim_run(folder, self.name, or_another=True)  # wandb does not know what runs are here
            self.name = self._run.name = self.claim.name
        if not known:
            described = {"arguments": config, "wandb": {"id": self._run.id, "name": self.name}, "versions": versions()}
            self.claim.describe(described)

    def log(self, values: dict, step: int) -> None:
        """Logs `values` (scalars or wandb objects) at `step`."""
        if self._run:
            self._run.log(values, step=self.offset + step)

    def log_table(self, key: str, table, step: int) -> None:
        """Logs a pandas table that may hold text; only ever called with `--log_text`."""
        import wandb

        if self._run:
            self._run.log({key: wandb.Table(dataframe=table)}, step=self.offset + step)

    def log_bars(self, key: str, heights: dict[int, float]) -> None:
        """Logs a bar chart of rewards by turn number."""
        import wandb

        if not self._run:
            return
        table = wandb.Table(columns=["turn", "predicted reward"], data=[[str(n), r] for n, r in heights.items()])
        self._run.log({key: wandb.plot.bar(table, "turn", "predicted reward", title="predicted reward by turn")})

    def summary(self, values: dict) -> None:
        """Sets the run's summary values."""
        if self._run:
            self._run.summary.update(values)

    def finish(self) -> None:
        """Flushes and closes the run, whose files are all written: what could resume it is removed."""
        if self._run:
            self._run.finish()
        if self.claim:
            self.claim.remove()


def _without_folders(value):
    """An option's value; of a path of this machine its last part alone."""
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and "=" in value:  # --trl NAME=VALUE
        name, _, value = value.partition("=")
        return f"{name}={_without_folders(value)}"
    here = isinstance(value, str) and "/" in value and (os.path.isabs(value) or os.path.exists(value))
    return os.path.basename(os.path.normpath(value)) if here else value


def _logged_in() -> bool:
    """Whether this user has a wandb key, found without asking the network or the user."""
    import netrc
    from urllib.parse import urlsplit

    import wandb

    settings = wandb.Settings()
    if os.environ.get("WANDB_API_KEY") or settings.api_key:
        return True
    servers = (os.environ.get("WANDB_BASE_URL"), settings.base_url, "https://api.wandb.ai")
    try:
        keys = netrc.netrc(os.environ.get("NETRC"))
        return any(keys.authenticators(urlsplit(server).netloc) for server in servers if server)
    except (OSError, netrc.NetrcParseError):
        return False


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def format_table(rows: list[dict], title: str = "") -> str:
    """Rows of equal keys as a text table; numbers with four significant digits."""
    import pandas as pd

    def show(value):
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    frame = pd.DataFrame([{key: show(value) for key, value in row.items()} for row in rows])
    return f"{title}\n{frame.to_string(index=False)}" if title else frame.to_string(index=False)


def progress_bar(*args, **kwargs):
    """tqdm on stderr, for what takes over a second; where nobody watches (a file, a pipe), a line now and then."""
    from tqdm import tqdm

    watched = sys.stderr.isatty()
    kwargs["disable"] = kwargs.get("disable", False) or not is_writer()
    return tqdm(*args, dynamic_ncols=watched, mininterval=0.1 if watched else 30, delay=1, leave=False, **kwargs)
