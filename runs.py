"""What a run leaves behind: its name, its folders, files that are never half-written, wandb, and the closing table."""

import json
import os
import platform
import random
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path

from cli import UserError

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

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True, "auto": True}
    if not available[device]:
        raise UserError(f"--device {device}: this machine has none that torch can use; try --device auto")
    if dtype == "auto" and (device == "cpu" or not (available["cuda"] or available["mps"])):
        dtype = cpu_dtype
    bfloat16 = dtype == "bfloat16" or (dtype == "auto" and _computes_in_bfloat16(device))
    _check_spreading()
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


def _is_set(variable: str) -> bool:
    """Whether `accelerate launch` set this to true."""
    return os.environ.get(variable, "false").lower() == "true"


def _check_spreading() -> None:
    """Reads how `accelerate launch` was configured to spread models, before accelerate does.

    A DeepSpeed configuration is taken as what it asks for: weights, gradients and optimizer states in 1/n at each
    process, and with ZeRO 3 weights that are gathered a layer at a time. `spread` does that, DeepSpeed is not run.
    """
    if _is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("accelerate is configured for Megatron-LM: expected FSDP, DeepSpeed or whole copies")
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "none")
        moved = {
            os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none") for what in ("PARAM", "OPTIMIZER")
        }
        if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ or stage not in ("0", "1", "2", "3") or moved != {"none"}:
            raise UserError(
                f"accelerate is configured for DeepSpeed: expected zero_stage from 0 to 3 in accelerate's own file, no "
                f"deepspeed_config_file and nothing offloaded, found zero_stage {stage}, offloaded to "
                f"{', '.join(sorted(moved))}; see accelerate_configs/deepspeed_zero3.yaml"
            )
        os.environ.update(ACCELERATE_USE_DEEPSPEED="false", ACCELERATE_USE_FSDP=str(stage != "0").lower())
        os.environ.update(FSDP_VERSION="2", FSDP_RESHARD_AFTER_FORWARD=str(stage == "3").lower())
    if not _is_set("ACCELERATE_USE_FSDP"):
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2" or _is_set("FSDP_OFFLOAD_PARAMS") or _is_set("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError(
            f"accelerate is configured for FSDP: expected fsdp_version 2 without fsdp_offload_params and "
            f"fsdp_activation_checkpointing, found version {version}; see accelerate_configs/fsdp.yaml"
        )
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # else transformers reads no weights but in one process


def spread(owner, accelerator):
    """Puts `owner`, a module whose `model` is a transformer, on the device: whole, or, where `accelerate launch` was
    configured for FSDP, with the weights of the model's layers spread over the processes (torch's `fully_shard`, with
    the settings of accelerate's plugin) and gathered a layer at a time where they are needed.

    Embeddings, norms and heads outside the layers stay whole, and so do the weights of a LoRA adapter. Gradients of
    what is spread are sums over the processes when the backward pass is over; `sum_gradients` adds up the others.

    Every forward and backward pass through spread layers is one that all processes make together. `owner.agree` is then
    set: the largest of the numbers that the processes call it with, by which they know how many passes to make.

    Raises:
        UserError: if the model has no layers that are known as such.
    """
    if not _is_set("ACCELERATE_USE_FSDP") or accelerator.num_processes == 1:
        return owner.to(accelerator.device)
    from accelerate import FullyShardedDataParallelPlugin
    from peft import PeftModel
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, device = owner.model, accelerator.device
    total = sum(p.numel() for p in model.parameters())
    plugin = FullyShardedDataParallelPlugin()  # reads the environment; on a CPU accelerate itself makes none
    settings = {
        "mesh": init_device_mesh(device.type, (accelerator.num_processes,)),
        "reshard_after_forward": plugin.reshard_after_forward,
    }
    layers = _layers(model, plugin.transformer_cls_names_to_wrap)
    if not layers:
        raise UserError(
            f"accelerate is configured for FSDP: found no layers to spread in {type(model).__name__}; name their class "
            "in its file as fsdp_transformer_layer_cls_to_wrap, with fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"
        )
    whole = {p for p in model.parameters() if p.requires_grad} if isinstance(model, PeftModel) else set()
    for layer, _ in layers:
        if not whole:
            layer.register_forward_hook(_use_all_weights)
        fully_shard(layer, ignored_params=whole, **settings)
        layer.set_gradient_divide_factor(1.0)  # our losses are parts of a sum
        layer.set_force_sum_reduction_for_comms(True)  # which gloo can do as well
    for stack in dict.fromkeys(stack for _, stack in layers):  # gathers a layer while the one before it computes
        fully_shard(stack, ignored_params={p for p in stack.parameters() if not _is_spread(p)}, **settings)
    for tensor in (*owner.parameters(), *owner.buffers()):
        if not _is_spread(tensor):
            tensor.data = tensor.data.to(device)
    owner.agree = partial(_largest, device=device)
    mine = sum(p.to_local().numel() if _is_spread(p) else p.numel() for p in model.parameters())
    print(
        f"FSDP: of {total:,} weights each of {accelerator.num_processes} processes holds {mine:,} "
        f"({len(layers)} layers are spread)"
    )
    return owner


def _layers(model, names: Sequence[str] | None) -> list[tuple]:
    """The layers of a transformer, each with the module that runs them one after another: modules of the classes
    `names`, else what is in its outermost module lists."""
    from torch import nn

    modules, found = dict(model.named_modules()), {}
    for path, module in modules.items():
        above = path.rpartition(".")[0]
        named = type(module).__name__ in names if names else isinstance(modules.get(above), nn.ModuleList)
        if not named or any(path.startswith(f"{outer}.") for outer in found):
            continue
        while isinstance(modules[above], nn.ModuleList):
            above = above.rpartition(".")[0]
        found[path] = (module, modules[above])
    return list(found.values())


def _use_all_weights(layer, inputs, output):
    """Forward hook of a layer: gives every weight that trains a gradient, if a zero. Which get one else depends on the
    input in some models (LongT5's, on its length), and the processes then add up gradients of different sizes."""
    import torch

    trained = [p.flatten()[0] for p in layer.parameters() if p.requires_grad]
    if not trained or not torch.is_grad_enabled():
        return output
    first, *others = output if isinstance(output, tuple) else (output,)
    first = first + 0 * torch.stack([p.to(first.dtype) for p in trained]).sum()
    return (first, *others) if isinstance(output, tuple) else first


def _largest(n: int, device) -> int:
    """The largest of all processes' n."""
    import torch

    number = torch.tensor(n, device=device)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return int(number)


def _is_spread(tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole_state(model) -> dict:
    """The state of a model that `spread` may have spread, whole and on the CPU; all processes ask for it together."""
    for module in model.modules():
        if hasattr(module, "reshard"):  # what a forward pass without a backward pass may have left gathered
            module.reshard()
    state = model.state_dict()
    return {name: (t.full_tensor() if _is_spread(t) else t).cpu() for name, t in state.items()}


def sum_gradients(parameters: Iterable, accelerator) -> None:
    """Adds up the gradients of all processes, where that is not done already (see `spread`); one that had nothing to do
    adds zeros, so that none waits for it."""
    import torch

    if accelerator.num_processes == 1:
        return
    parameters = [p for p in parameters if not _is_spread(p)]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = torch.cat([p.grad.flatten().to(accelerator.device) for p in parameters])  # what the processes talk over
    total = accelerator.reduce(flat, "sum")
    for p, gradient in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(gradient.view_as(p))


@contextmanager
def atomic_path(path: str | Path, everyone: bool = False) -> Iterator[Path]:
    """Gives a temporary name beside `path` to write to; renamed to `path` on success, removed on failure. Of several
    processes only the writer's file stays, unless `everyone`'s does."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp{path.suffix}"
    try:
        yield temporary
        if everyone or is_writer():
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """As `atomic_path`, for a folder; a folder of that name is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        if not is_writer():
            return
        if path.exists():
            old = temporary.with_suffix(".old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    """A name of wandb's kind (adjective-noun-number) that no run in `folder` has."""
    taken = len(list(folder.glob("reward1_*.json"))) if folder.is_dir() else 0
    while True:
        name = f"{secrets.choice(_ADJECTIVES)}-{secrets.choice(_NOUNS)}-{taken + 1}"
        if not _record(folder, name).exists():
            return name


def _record(folder: Path, run_name: str) -> Path:
    return folder / f"reward1_{run_name}.json"


class Tracker:
    """A wandb run: online when logged in (or `WANDB_MODE=online`), else offline; it never asks and sends no console.

    Args:
        project: wandb's project.
        folder: where outputs go; `wandb/` lies beside it.
        config: what describes the run; no text or id of a conversation.
        run_name: a name to use, or None for wandb's own (offline: one like it, new in `folder`).
        accelerator: `accelerate.Accelerator`; of several processes one tracks, and all know the name.

    Attributes:
        name: the run's name.
    """

    def __init__(self, project: str, folder: Path, config: dict, run_name: str | None, accelerator):
        from accelerate.utils import broadcast_object_list

        self._run = None
        if is_writer():
            self._start(project, folder, {**config, "processes": accelerator.num_processes}, run_name)
        else:
            self.name = ""
        self.name = broadcast_object_list([self.name])[0]

    def _start(self, project: str, folder: Path, config: dict, run_name: str | None) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        if run_name is not None and ((folder / f"reward1_{run_name}").exists() or _record(folder, run_name).exists()):
            raise UserError(f"--run_name {run_name}: {folder} has a run of that name already; choose another")
        mode = os.environ.get("WANDB_MODE") or "online"
        if mode == "online" and not _logged_in():  # wandb would ask for a key
            mode = "offline"
        if run_name is None and mode != "online":
            run_name = new_run_name(folder)
        settings = wandb.Settings(
            console="off",  # responses are printed, and conversations do not leave the machine
            disable_git=True,
            save_code=False,
            x_save_requirements=False,
            silent=True,
            init_timeout=30,  # seconds; then the run goes on offline
        )
        arguments = dict(project=project, name=run_name, dir=str(folder.parent), config=config, settings=settings)
        try:
            self._run = wandb.init(mode=mode, **arguments)
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            print(f"wandb: no connection ({first_line(error)}); this run is logged offline")
            arguments["name"] = run_name or new_run_name(folder)
            self._run = wandb.init(mode="offline", **arguments)
        self.name = run_name or self._run.name or new_run_name(folder)

    def log(self, values: dict, step: int) -> None:
        """Logs `values` (scalars or wandb objects) at `step`."""
        if self._run:
            self._run.log(values, step=step)

    def log_table(self, key: str, table, step: int) -> None:
        """Logs a pandas table that may hold text; only ever called with `--log_text`."""
        import wandb

        if self._run:
            self._run.log({key: wandb.Table(dataframe=table)}, step=step)

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
        """Flushes and closes the run."""
        if self._run:
            self._run.finish()


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
