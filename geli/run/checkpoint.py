"""Checkpoints: saving a run and restoring it bit for bit.

They are written by `torch.save` into the run's folder (see `geli.run.lock`), and read with `weights_only=True`, so
that loading one executes no code.
"""

import os
import random
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from geli.run.console import is_main_process
from geli.run.errors import Stopped, UserError, first_line
from geli.run.files import atomic_path, write_json
from geli.run.lock import RunLock, list_checkpoints
from geli.run.sharding import reshard

CHECKPOINTS_KEPT = 2
_FORMAT = "geli-checkpoint-1"
_TYPES = {"step": int, "modules": dict, "optimizer": dict, "values": dict, "random": list, "inputs": dict}
# whole tensors on the CPU, of trained parameters only
_SAVED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
# a parameter that has had no gradient yet has no optimizer state
_OPTIMIZER_LOADED = StateDictOptions(full_state_dict=True, strict=False)


class _StepStopped(BaseException):
    """SIGTERM came in a step that can be given up."""


class Checkpointer:
    """Saves a run at intervals, on SIGTERM and Ctrl-C, and before a step that fails; restores it bit for bit.

    Args:
        lock: the run's lock (None in processes other than the main one). accelerator: of the run.
        modules: name -> module; their trained parameters and their buffers are saved. optimizer: of their parameters.
        values: name -> a dict of plain values, or an object with `state_dict` and `load_state_dict`.
        generators: name -> a NumPy or torch generator. (The global ones of Python, NumPy and torch are saved too.)
        inputs: name of an input -> its hash; a run is resumed with the same inputs only.
        every: steps between two checkpoints (`--save_steps`). total: steps of the run.
        keep_copy: keep a copy of the state after each step, for loops in which a failing step may change the state.
    """

    def __init__(self, lock: RunLock | None, accelerator: Accelerator, *, modules: dict[str, nn.Module],
                 optimizer: torch.optim.Optimizer, values: dict, generators: dict, inputs: dict[str, str],
                 every: int, total: int, keep_copy: bool = False):  # fmt: skip
        self.folder = Path(broadcast_object_list([lock and str(lock.folder)])[0])
        self.accelerator, self.optimizer, self.values = accelerator, optimizer, values
        self.model = nn.ModuleDict(modules)  # one module, whose names are unique in the optimizer's state
        self.generators, self.inputs, self.every, self.total = generators, inputs, every, total
        self.keep_copy = keep_copy
        self.saved: int | None = None  # the step of the newest checkpoint
        self._signal, self._signal_time = 0, 0.0
        self._failed = self._can_give_up = False
        self._good: tuple[int, dict | None, dict | None] = (0, None, None)  # step, random states, copy of the state

    def restore(self) -> int:
        """Restores the newest readable checkpoint. Returns its step, 0 if there is none. Raises a `UserError` if the
        inputs or the number of processes differ from the checkpoint's, if it does not fit the run, or if the processes
        see different ones."""
        step = self._restore()
        if len(set(gather_object([step]))) > 1:
            raise UserError(
                f"--resume: not every process sees the same checkpoints in {self.folder}: all need one folder"
            )
        return step

    def _restore(self) -> int:
        for path in reversed(list_checkpoints(self.folder)):
            try:
                checkpoint = _read(path)
            except Exception as error:  # zipfile and pickle raise many kinds for damaged files
                print(f"Checkpoint {path} is skipped: {first_line(error)}")
                continue
            inputs, states, processes = checkpoint["inputs"], checkpoint["random"], self.accelerator.num_processes
            if inputs != self.inputs:
                changed = ", ".join(name for name in self.inputs if inputs.get(name) != self.inputs[name])
                raise UserError(f"--resume: not the same {changed or 'input'} as when {path} was written; start anew")
            if len(states) != processes:
                raise UserError(
                    f"--resume: {path} was written by {len(states)} processes: expected as many, found {processes}"
                )
            try:
                self._load(checkpoint)
                self._set_random_states(states[self.accelerator.process_index])
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
                raise UserError(f"--resume: {path} does not fit this run ({first_line(error)}); start anew") from None
            self.saved = checkpoint["step"]
            self._keep(self.saved)
            print(f"Resuming after step {self.saved:,} of {self.total:,}: {path}")
            return self.saved
        self._keep(0)
        return 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """While training: the first SIGTERM or Ctrl-C takes effect at the end of a step (see `done`), and the message
        of an error says which checkpoint was kept."""
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        except (UserError, OSError) as error:
            raise UserError(f"{str(error).rstrip('.')}; {self._kept()}") from error
        except Exception:
            print(f"The run has failed; {self._kept()}", file=sys.stderr)
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the computation of a step. SIGTERM gives it up if the state before it is kept: schedulers kill a job
        some seconds later, and a step may take minutes. Several processes cannot end a step together: they finish it.

        Raises:
            Stopped: after SIGTERM.
        """
        kept = self.keep_copy or self.saved == self._good[0]
        self._can_give_up = kept and self.accelerator.num_processes == 1 and not self._signal
        try:
            yield
        except _StepStopped:
            if self.saved != self._good[0]:
                self._save()
            raise self._stopped(signal.SIGTERM, self._good[0]) from None
        finally:
            self._can_give_up = False

    def done(self, step: int, save: bool = False) -> None:
        """Call after each step. Saves every `every` steps, after the last one, after a signal, or if `save` is set, as
        it must be when the step wrote a new best model. After a signal it ends the run (`Stopped`)."""
        self._keep(step)
        number = max(gather_object([self._signal]))
        if step % self.every == 0 or step == self.total or number or save:
            self._save()
        if number:
            raise self._stopped(number, step)

    def _stopped(self, number: int, step: int) -> Stopped:
        name = signal.Signals(number).name
        return Stopped(f"stopped by {name} after step {step:,} of {self.total:,}; {self._kept()}", 128 + number)

    def not_finite(self, what: str, step: int, ids: Sequence[str]) -> None:
        """Saves the state before `step` and ends the run by a `UserError`, because `what` is NaN or infinite. The names
        `ids` of the items in the batch are written to `not_finite.json`; the message shows three."""
        if self.saved != self._good[0]:
            self._save()
        path = self.folder / "not_finite.json"
        write_json(path, {"step": step, "what": what, "batch": list(ids)})
        shown = ", ".join(ids[:3]) + (", …" if len(ids) > 3 else "")
        self._failed = True
        raise UserError(f"{what} is not finite at step {step} (batch: {shown}; all in {path})")

    def _kept(self) -> str:
        if self.saved is None:
            return "no checkpoint was saved yet: the same command with --resume begins at the first step"
        kept = f"the checkpoint after step {self.saved:,} of {self.total:,} is kept in {self.folder}"
        if self._failed:
            return f"{kept}, but would fail again: start anew with a lower --learning_rate"
        return f"{kept}: the same command with --resume continues from it"

    def _on_signal(self, number: int, frame) -> None:
        """Remembers the first signal. A launcher may repeat it; a second Ctrl-C a second later ends the run at once."""
        if number == signal.SIGINT and self._signal and time.monotonic() - self._signal_time > 1:
            raise Stopped(f"stopped within a step; {self._kept()}", 128 + number)
        if number == signal.SIGTERM and self._can_give_up:
            self._can_give_up = False
            raise _StepStopped
        if not self._signal:
            self._signal, self._signal_time = number, time.monotonic()
            if is_main_process():  # a handler may not print: it can interrupt a print
                os.write(2, b"\nStopping after this step; Ctrl-C again stops now.\n")

    def _keep(self, step: int) -> None:
        """Remembers the state after a step that succeeded."""
        self._good = (step, self._random_states(), _plain(self._state(), torch.clone) if self.keep_copy else None)

    def _save(self) -> None:
        """Writes a checkpoint of the last step that succeeded. All processes must call it together."""
        step, random_states, state = self._good
        random_states = gather_object([random_states])
        state = state or self._state()
        if is_main_process():
            header = {"format": _FORMAT, "step": step, "random": random_states, "inputs": self.inputs}
            with atomic_path(self.folder / f"step_{step:08}.pt") as temporary:
                try:
                    with open(temporary, "wb") as file:
                        torch.save(_plain(header | state, lambda tensor: tensor.detach().cpu()), file)
                except RuntimeError as error:  # torch raises it after the OSError that says why, such as a full disk
                    cause = error.__context__
                    raise cause if isinstance(cause, OSError) else OSError(first_line(error)) from None
            for path in list_checkpoints(self.folder)[:-CHECKPOINTS_KEPT]:
                path.unlink(missing_ok=True)
        self.saved = step

    def _state(self) -> dict:
        """The current state; tensors may share memory with the modules. In processes other than the main one those of
        modules and optimizer may be missing. All processes must call it together."""
        reshard(self.model)
        weights = get_model_state_dict(self.model, options=_SAVED)
        frozen = {name for name, p in self.model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        weights = {name: tensor for name, tensor in weights.items() if name not in frozen}  # tied ones are left in it
        if self.optimizer.state:
            optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=_SAVED)
        else:  # `get_optimizer_state_dict` would make a step with zero gradients, which counts
            optimizer = self.optimizer.state_dict()
        values = {name: v if isinstance(v, dict) else v.state_dict() for name, v in self.values.items()}
        return {"modules": weights, "optimizer": optimizer, "values": values}

    def _load(self, checkpoint: dict) -> None:
        reshard(self.model)
        weights = checkpoint["modules"]
        for name, parameter in self.model.named_parameters():
            shape = weights[name].shape if name in weights else None
            if parameter.requires_grad and shape != parameter.shape:
                raise ValueError(f"{name}: expected the shape {tuple(parameter.shape)}, found {shape and tuple(shape)}")
        set_model_state_dict(self.model, weights, options=_SAVED)
        saved = checkpoint["optimizer"]
        if saved["state"]:
            set_optimizer_state_dict(self.model, self.optimizer, saved, options=_OPTIMIZER_LOADED)
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
                if names[parameter] not in saved["state"]:  # it was given a zero state
                    self.optimizer.state.pop(parameter, None)
        else:
            self.optimizer.load_state_dict(saved)
        for name, value in self.values.items():
            if isinstance(value, dict):
                value.update(checkpoint["values"][name])
            else:
                value.load_state_dict(checkpoint["values"][name])

    def _random_states(self) -> dict:
        """The states of all random generators of this process."""
        states = {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state(self.accelerator.device)
        for name, generator in self.generators.items():
            is_torch = isinstance(generator, torch.Generator)
            states[f"generator {name}"] = generator.get_state() if is_torch else generator.bit_generator.state
        return states

    def _set_random_states(self, states: dict) -> None:
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["torch"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"], self.accelerator.device)
        for name, generator in self.generators.items():
            if isinstance(generator, torch.Generator):
                generator.set_state(states[f"generator {name}"])
            else:
                generator.bit_generator.state = states[f"generator {name}"]


def _read(path: Path) -> dict:
    """The content of a checkpoint file. Raises an exception of any kind if it is damaged, or is not a checkpoint."""
    with zipfile.ZipFile(path) as file:  # torch.save writes a checksum of every part, which torch.load does not check
        if file.testzip():
            raise ValueError("its content is not what was written")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:  # torch's own message recommends to load it unsafely
        raise ValueError("it holds more than tensors and plain values; nothing of it was run") from None
    if checkpoint["format"] != _FORMAT or {key: type(checkpoint[key]) for key in _TYPES} != _TYPES:
        raise ValueError(f"its format is not {_FORMAT}")
    return checkpoint


def _plain(value, tensor: Callable[[torch.Tensor], torch.Tensor]):
    """A copy of nested containers in which `tensor` was applied to tensors, and NumPy values became Python's.

    Raises:
        TypeError: for values that `torch.load(weights_only=True)` could not read.
    """
    if isinstance(value, torch.Tensor):
        return tensor(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item, tensor) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item, tensor) for item in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")
