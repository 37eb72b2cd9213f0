"""What lets a run go on after any death: a claim on its name, and states from which training continues exactly.

While a run lives it holds `state_{name}/` in its folder: a lock, `run.json` (how it was started), and its two newest
states, one safetensors file each, behind a checksum. Nothing in them is ever executed. A run that finishes removes it.
"""

import argparse
import fcntl
import json
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cli import Stopped, UserError, file_name
from runs import (
    TEMPORARY,
    atomic_path,
    checksum,
    first_line,
    is_writer,
    new_run_name,
    record_path,
    reward_outputs,
    temporary_name,
    write_json,
)
from sharding import reshard, spread_like, whole_tensor

STATES_KEPT = 2
ANY = re.compile(".*")
_FORMAT = "geli-state-1"
# options that a run may be resumed with another value of
_MAY_DIFFER = {"resume", "run_name", "save_steps", "data_dir", "output_dir", "no_cache", "log_text", "device"}


# ---------------------------------------------------------------------------------------------------------------------
# The claim: one living run a name


class Claim:
    """Holds a run's name in `folder` for as long as this process lives.

    Args:
        folder: where the run writes. name: of the run. outputs: what its files' names look like, to sweep away the
            temporary ones that an earlier death left. resume: take over what an earlier process of the run left.

    Attributes:
        folder: `state_{name}/`. description: what `describe` wrote, of a run that is resumed; else empty.

    Raises:
        FileExistsError: if there is such a run already, and it is not to be resumed.
        UserError: if the run is living.
    """

    def __init__(self, folder: Path, name: str, outputs: re.Pattern, resume: bool = False):
        self.name, self.folder = name, _state_folder(folder, name)
        self.folder.mkdir(parents=True, exist_ok=resume)
        self._lock = open(self.folder / "lock", "a")  # noqa: SIM115 (for as long as the process lives)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.folder}: the run {name} is being trained by another process") from None
        self.description = _description(self.folder)
        for where, names in ((folder, outputs), (folder, re.compile(re.escape(self.folder.name))), (self.folder, ANY)):
            _sweep(where, names)

    def describe(self, description: dict) -> None:
        """Writes down how the run was started."""
        self.description = description
        write_json(self.folder / "run.json", description)

    def states(self) -> list[Path]:
        """The states of the run, the newest last."""
        return _states(self.folder)

    def unfinished(self) -> list[Path]:
        """What an earlier process of the run left: how it was started, and its states."""
        return [path for path in sorted(self.folder.iterdir()) if path.name != "lock"]

    def release(self) -> None:
        """Leaves everything as it is, to whoever claims it next."""
        self._lock.close()

    def remove(self) -> None:
        """The run is finished, or there was nothing to hold on to."""
        gone = temporary_name(self.folder)
        self.folder.rename(gone)  # in one step: of a finished run nothing stays that looks like an unfinished one
        shutil.rmtree(gone, ignore_errors=True)
        self.release()


def claim_run(folder: Path, name: str | None = None, or_another: bool = False) -> Claim:
    """A claim on a new name of a run of stage 1 or 2: on `name`, where one is given, `or_another` if that is taken.

    Raises:
        UserError: if it is taken.
    """
    while True:
        own, new, claim = name or new_run_name(folder), True, None
        try:
            claim = Claim(folder, own, reward_outputs(own))
        except FileExistsError:
            new = False
            if name and not or_another:
                claim = Claim(folder, own, reward_outputs(own), resume=True)
        written = record_path(folder, own).exists() or (folder / f"reward1_{own}").exists()
        if claim and not written and not claim.states():  # an earlier run died before there was anything to go on with
            claim.description = {}
            return claim
        if claim:
            claim.remove() if new else claim.release()
        if name and not or_another:
            raise UserError(
                f"--run_name {name}: {folder} has a run of that name already: choose another, or give --resume to go "
                "on with it where it is unfinished"
            )
        name = None


def _state_folder(folder: Path, name: str) -> Path:
    return folder / f"state_{name}"


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.safetensors"))


def _description(folder: Path) -> dict:
    """How a run was started, by its `run.json`; empty if that is not there or is no such thing."""
    found = _read_json(folder / "run.json")
    wandb = found.get("wandb")
    try:
        sound = isinstance(found.get("arguments"), dict) and re.fullmatch(r"\w+", wandb["id"])
        return found if sound and file_name(wandb["name"]) else {}
    except (TypeError, KeyError, AttributeError, argparse.ArgumentTypeError):
        return {}


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _sweep(folder: Path, outputs: re.Pattern) -> None:
    """Removes the temporary files of these outputs."""
    for path in folder.glob(".*"):
        temporary = TEMPORARY.fullmatch(path.name)
        if temporary and outputs.fullmatch(temporary["name"]):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def claim_to_resume(args, folder: Path, outputs, record, name: str | None) -> Claim | None:
    """What `--resume` goes on with: the run `name`, or else the newest unfinished one in `folder` that was started with
    the same options. None, said in a line, where there is nothing to go on with.

    Args:
        args: the options. outputs: run name -> what its files' names look like. record: run name -> the file that a
            finished run has written. (Of several processes one holds the claim, the others get None.)

    Raises:
        UserError: if the run `name` was started with other options, or is living. SystemExit: if it is complete.
    """
    from accelerate.utils import broadcast_object_list

    claim, complete = None, False
    if is_writer():
        claim, complete = _find(args, folder, outputs, record, name)
    if broadcast_object_list([complete])[0]:
        raise SystemExit(0)
    return claim


def reward_run_to_resume(args, folder: Path) -> Claim | None:
    """`claim_to_resume` for stages 1 and 2, whose files are named after their runs; None without `--resume`."""
    if not args.resume:
        return None
    claim = claim_to_resume(args, folder, reward_outputs, partial(record_path, folder), args.run_name)
    if claim and claim.description:
        claim.description["wandb"]["name"] = claim.name  # which its files have
    return claim


def _find(args, folder: Path, outputs, record, name: str | None) -> tuple[Claim | None, bool]:
    found = [_state_folder(folder, name)] if name else list(folder.glob("state_*"))
    found = sorted((path for path in found if path.is_dir()), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    refused = []
    for path in found:
        own, known = path.name.removeprefix("state_"), _description(path).get("arguments")
        if known is None and (not name or record(name).exists()):
            continue  # it died before it began, or after its end
        reason = _difference(known, args) if known is not None else None
        if reason and _states(path):
            refused.append(f"{path} was started with {reason}")
        elif not reason or name:
            try:
                claim = Claim(folder, own, outputs(own), resume=True)
            except UserError as error:
                refused.append(str(error))
                continue
            if reason:  # it has no state, so that nothing is lost by beginning it anew
                claim.description = {}
            return claim, False
    known = _arguments(record(name)) if name and not refused else None
    if known is not None:
        reason = _difference(known, args)
        if not reason:
            print(f"--resume: the run {name} is complete already ({record(name)})")
            return None, True
        refused.append(f"{name} is complete, and was started with {reason}")
    if name and refused:
        raise UserError(f"--resume: {refused[0]}; leave --resume away, and choose another name, to start anew")
    for reason in refused:
        print(f"--resume: not {reason}")
    print(f"--resume: no unfinished run of these options in {folder}; starting from the beginning")
    return None, False


def _arguments(path: Path) -> dict | None:
    """The options in a run's JSON file; None if there are none."""
    found = _read_json(path).get("arguments")
    return found if isinstance(found, dict) else None


def _difference(known: dict, args) -> str | None:
    """The first option that was another one than it is asked for now."""
    asked = json.loads(json.dumps(vars(args), default=str))
    for name, value in asked.items():
        if name not in _MAY_DIFFER and (name not in known or known[name] != value):
            return f"--{name} {known.get(name, '(unknown)')}, not {value}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# States


class Trained:
    """The trained parameters of a module, as a part of a state. Args: module: whose parameters with gradients count."""

    def __init__(self, module: nn.Module):
        self.module = module

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Name -> value."""
        reshard(self.module)
        return {name: p.detach() for name, p in self._parameters().items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Copies values into the parameters, which stay where they are."""
        reshard(self.module)
        mine = self._parameters()
        if mine.keys() != state.keys():
            raise ValueError(f"parameters {sorted(mine.keys() ^ state.keys())[:3]} are not in both")
        for name, parameter in mine.items():
            if parameter.shape != state[name].shape:
                raise ValueError(f"{name} has the shape {tuple(state[name].shape)}, not {tuple(parameter.shape)}")
            parameter.copy_(spread_like(parameter, state[name]))


class RunState:
    """Saves the state of a run at intervals, on SIGTERM and Ctrl-C, and before a step that went wrong.

    Args:
        tracker: the run's `runs.Tracker`, which holds the claim. accelerator: `accelerate.Accelerator`.
        parts: name -> what has `state_dict` and `load_state_dict`, or a dict of plain values.
        generators: name -> a NumPy or torch generator. (Python's, NumPy's and torch's own are saved as well.)
        inputs: what the run is given -> a hash of it; a run is not resumed on anything else.
        every: steps between two states (`--save_steps`). total: steps of the run.
        keep_copy: keep the values of the last good step in memory, where a step that fails may have changed some.
    """

    def __init__(self, tracker, accelerator, parts, generators, inputs: dict[str, str], every: int, total: int,
                 keep_copy: bool = False):  # fmt: skip
        from accelerate.utils import broadcast_object_list

        claim = tracker.claim
        self.folder = Path(broadcast_object_list([claim and str(claim.folder)])[0])
        self.accelerator, self.parts, self.generators, self.inputs = accelerator, parts, generators, inputs
        self.every, self.total, self.keep_copy = every, total, keep_copy
        self.saved: int | None = None  # the step of the newest state
        self._signal, self._signalled_at = 0, 0.0
        self._failed = False  # and would fail again
        self._good: tuple = (0, None, None)  # step, random states, and values where they are kept

    def restore(self) -> int:
        """Puts everything as it was after the newest complete state; returns its step, 0 where there is none.

        Raises:
            UserError: if the run was given something else then, or the processes do not see the same state.
        """
        from accelerate.utils import gather_object

        step = self._restore()
        if self.accelerator.num_processes > 1 and len(set(gather_object([step]))) > 1:
            raise UserError(f"--resume: not every process sees the same states in {self.folder}: all need one folder")
        return step

    def _restore(self) -> int:
        for path in reversed(_states(self.folder)):
            try:
                step, values, randoms, inputs = _read(path)
            except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
                print(f"State: {path} is not used ({first_line(error)})")
                continue
            if inputs != self.inputs:
                what = ", ".join(name for name in self.inputs if inputs.get(name) != self.inputs[name])
                raise UserError(f"--resume: not the same {what or 'input'} as when {path} was written; start anew")
            if len(randoms) != self.accelerator.num_processes:
                raise UserError(
                    f"--resume: {path} was written by {len(randoms)} processes: expected as many, "
                    f"found {self.accelerator.num_processes}"
                )
            try:
                self._set_values(values)
                self._set_random(randoms[self.accelerator.process_index])
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
                raise UserError(f"--resume: {path} does not fit this run ({first_line(error)}); start anew") from None
            self.saved = step
            self._keep(step)
            print(f"Going on after step {step:,} of {self.total:,}: {path}")
            return step
        self._keep(0)
        return 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """While training: a first SIGTERM or Ctrl-C lets the step end, and a failure says what was kept."""
        before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        except (UserError, OSError) as error:
            raise UserError(f"{str(error).rstrip('.')}; {self._kept()}") from None
        except Exception:
            print(f"The run has failed; {self._kept()}", file=sys.stderr)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def done(self, step: int, save: bool = False) -> None:
        """After a step: saves a state when one is due, or when what the step has written (the best) asks for it.

        Raises:
            Stopped: after a signal.
        """
        self._keep(step)
        number = self._signal_anywhere()
        if step % self.every == 0 or step == self.total or number or save:
            self._save()
        if number:
            raise Stopped(
                f"stopped by {signal.Signals(number).name} after step {step:,} of {self.total:,}; {self._kept()}",
                128 + number,
            )

    def not_finite(self, what: str, step: int, ids: Sequence[str]) -> None:
        """Ends a run whose `what` is not finite at `step`, before anything that came of it is kept.

        Args:
            ids: of the batch; all go into a file beside the state, a few into the message.

        Raises:
            UserError: always.
        """
        if self.saved != self._good[0]:
            self._save()
        path = self.folder / "not_finite.json"
        write_json(path, {"step": step, "what": what, "batch": list(ids)})
        shown = ", ".join(ids[:3]) + (", …" if len(ids) > 3 else "")
        self._failed = True
        raise UserError(f"{what} is not finite at step {step} (batch: {shown}; all in {path})")

    def _kept(self) -> str:
        if self.saved is None:
            return "no state of it was saved yet"
        kept = f"the state after step {self.saved:,} of {self.total:,} is kept in {self.folder}"
        if self._failed:
            return f"{kept}, and would fail again: start anew with a lower --learning_rate"
        return f"{kept}: the same command with --resume goes on from there"

    def _remember(self, number: int, frame) -> None:
        """The first signal; it may come more than once, from a launcher and from whom it obeys."""
        if number == signal.SIGINT and self._signal and time.monotonic() - self._signalled_at > 1:
            raise KeyboardInterrupt  # somebody does not want to wait
        if not self._signal:
            self._signal, self._signalled_at = number, time.monotonic()

    def _signal_anywhere(self) -> int:
        """The signal that this or another process got, else 0."""
        if self.accelerator.num_processes == 1:
            return self._signal
        mine = torch.tensor([self._signal], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())

    def _keep(self, step: int) -> None:
        values = _mapped(torch.clone, self._values()) if self.keep_copy else None
        self._good = (step, self._random(), values)

    def _save(self) -> None:
        """Writes the state after the last good step."""
        step, mine, values = self._good
        randoms = [mine]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            randoms = gather_object(randoms)
        values = _mapped(whole_tensor, values or self._values())
        if is_writer():
            _write(self.folder / f"step_{step:08}.safetensors", step, values, randoms, self.inputs)
            for path in _states(self.folder)[:-STATES_KEPT]:
                path.unlink(missing_ok=True)
        self.saved = step

    def _values(self) -> dict:
        return {name: dict(p) if isinstance(p, dict) else p.state_dict() for name, p in self.parts.items()}

    def _set_values(self, values: dict) -> None:
        for name, part in self.parts.items():
            if isinstance(part, dict):
                part.update(values[name])
                continue
            if isinstance(part, torch.optim.Optimizer):
                _spread_moments(part, values[name]["state"])
            part.load_state_dict(values[name])

    def _random(self) -> dict:
        """The states of all sources of random numbers of this process."""
        found = {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            found["cuda"] = torch.cuda.get_rng_state(self.accelerator.device)
        for name, generator in self.generators.items():
            is_torch = isinstance(generator, torch.Generator)
            found[f"generator {name}"] = generator.get_state() if is_torch else generator.bit_generator.state
        return found

    def _set_random(self, found: dict) -> None:
        random.setstate(found["python"])
        np.random.set_state(found["numpy"])
        torch.set_rng_state(found["torch"])
        if "cuda" in found and torch.cuda.is_available():
            torch.cuda.set_rng_state(found["cuda"], self.accelerator.device)
        for name, generator in self.generators.items():
            if isinstance(generator, torch.Generator):
                generator.set_state(found[f"generator {name}"])
            else:
                generator.bit_generator.state = found[f"generator {name}"]


# ---------------------------------------------------------------------------------------------------------------------
# A state's file: tensors, and a tree of plain values that says where they belong


def _write(path: Path, step: int, values: dict, randoms: list, inputs: dict) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    tree = json.dumps(_packed({"step": step, "values": values, "random": randoms, "inputs": inputs}, tensors))
    metadata = {"format": _FORMAT, "tree": tree, "checksum": checksum(tensors, tree)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _read(path: Path) -> tuple[int, dict, list, dict]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle, not a dict)
    except SafetensorError as error:
        raise ValueError(first_line(error)) from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"its metadata has no format {_FORMAT}")
    if metadata["checksum"] != checksum(tensors, metadata["tree"]):
        raise ValueError("its content is not what was written")
    found = _unpacked(json.loads(metadata["tree"]), tensors)
    return int(found["step"]), found["values"], found["random"], found["inputs"]


def _packed(value, tensors: dict[str, torch.Tensor]):
    """`value` as JSON can hold it; its tensors go into `tensors`."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        name = str(len(tensors))
        tensors[name] = tensor.detach().cpu().contiguous()
        return {"tensor" if tensor is value else "array": name}
    if isinstance(value, dict):
        return {"dict": [[_packed(key, tensors), _packed(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_packed(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a state cannot hold a {type(value).__name__}")


def _unpacked(tree, tensors: dict[str, torch.Tensor]):
    """The value that `_packed` packed."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind in ("tensor", "array"):
        return tensors[content] if kind == "tensor" else tensors[content].numpy()
    if kind == "dict":
        return {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in content}
    return {"list": list, "tuple": tuple}[kind](_unpacked(item, tensors) for item in content)


def _spread_moments(optimizer, state: dict[int, dict]) -> None:
    """Spreads an optimizer's saved state as the parameters that it belongs to are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, entries in state.items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameters[i].shape:
                entries[name] = spread_like(parameters[i], value)


def _mapped(change: Callable[[torch.Tensor], torch.Tensor], value):
    """The value with each of its tensors changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(change, item) for key, item in value.items()}
    return type(value)(_mapped(change, item) for item in value) if isinstance(value, (list, tuple)) else value
