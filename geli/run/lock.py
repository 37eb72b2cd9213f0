"""The lock on a run's name, and finding the run that `--resume` resumes.

While a run trains it has a folder `state_{name}/` with a lock, `run.json` (its options), and its two newest
checkpoints. A finished run removes the folder.
"""

import argparse
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import filelock
from accelerate.utils import broadcast_object_list

from geli.run.console import is_main_process
from geli.run.errors import UserError
from geli.run.files import TEMPORARY, read_json_or_empty, temporary_name, write_json
from geli.run.options import file_name
from geli.run.run_names import new_run_name, record_path, reward_outputs

# options that may be different when a run is resumed
_MAY_DIFFER = {"resume", "run_name", "save_steps", "data_dir", "output_dir", "no_cache", "log_text", "device"}


class RunLock:
    """Reserves a run's name in `folder` until it is released or the process ends, however it ends.

    Args:
        folder: where the run writes. name: of the run. outputs: matches the names of the run's files; temporary files
            that an earlier process left of them are removed. resume: keep what an earlier process of the run saved.

    Attributes:
        folder: `state_{name}/`. description: the content of `run.json` if the run is resumed, else empty.

    Raises a FileExistsError if the run exists and `resume` is not set, a `UserError` if another process trains it.
    """

    def __init__(self, folder: Path, name: str, outputs: re.Pattern, resume: bool = False):
        self.name, self.folder = name, folder / f"state_{name}"
        self.folder.mkdir(parents=True, exist_ok=resume)
        self._lock = filelock.FileLock(self.folder / "lock", timeout=0)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise UserError(f"{self.folder}: the run {name} is being trained by another process") from None
        self.description = _description(self.folder)
        _remove_temporaries(folder, outputs)
        _remove_temporaries(folder, re.compile(re.escape(self.folder.name)))
        _remove_temporaries(self.folder, re.compile(".*"))

    def describe(self, description: dict) -> None:
        """Writes `run.json`: the run's options, its wandb id and name, and versions of packages."""
        self.description = description
        write_json(self.folder / "run.json", description)

    def unfinished(self) -> list[Path]:
        """The files of an earlier process of the run that did not finish: `run.json` and checkpoints."""
        return [path for path in sorted(self.folder.iterdir()) if path.name != "lock"]

    def release(self) -> None:
        """Releases the name and keeps the files, so that the run can be resumed."""
        self._lock.release()

    def remove(self) -> None:
        """Removes the folder of a finished run and releases its name."""
        removed = temporary_name(self.folder)
        self.folder.rename(removed)  # one step, so that no part is left under a name that looks unfinished
        shutil.rmtree(removed, ignore_errors=True)
        self.release()


def lock_new_run(folder: Path, name: str | None = None, or_another: bool = False) -> RunLock:
    """Locks the `name` of a new run of stage 1 or 2 that writes to `folder`; without one, or if it is taken and
    `or_another` is set, a random name. Raises a `UserError` if `name` is taken."""
    while True:
        run_name, created, lock = name or new_run_name(folder), True, None
        try:
            lock = RunLock(folder, run_name, reward_outputs(run_name))
        except FileExistsError:
            created = False
            if name and not or_another:
                lock = RunLock(folder, run_name, reward_outputs(run_name), resume=True)
        written = record_path(folder, run_name).exists() or (folder / f"reward1_{run_name}").exists()
        if lock and not written and not list_checkpoints(lock.folder):  # new, or ended before its first checkpoint
            lock.description = {}
            return lock
        if lock:
            lock.remove() if created else lock.release()
        if name and not or_another:
            raise UserError(
                f"--run_name {name}: {folder} has a run of that name already: choose another, or give --resume to "
                "resume it if it is unfinished"
            )
        name = None


def lock_to_resume(
    arguments: dict, folder: Path, outputs: Callable[[str], re.Pattern], record: Callable[[str], Path], name: str | None
) -> RunLock | None:
    """With `--resume`, locks the run that it resumes: the run `name`, else the newest unfinished one in `folder` that
    was started with the same options. If there is none, prints a line; ends the program if the run `name` is finished.

    Args:
        arguments: option name -> value. folder: where runs write. outputs: run name -> matches the names of its files.
        record: run name -> the file that exists once the run is finished.

    Returns:
        The lock in the main process, None in the others and without such a run. Raises a `UserError` if the run `name`
        was started with other options, or is being trained.
    """
    if not arguments["resume"]:
        return None
    lock, finished = _find_run(arguments, folder, outputs, record, name) if is_main_process() else (None, False)
    if broadcast_object_list([finished])[0]:
        raise SystemExit(0)
    return lock


def reward_run_to_resume(arguments: dict, folder: Path) -> RunLock | None:
    """`lock_to_resume` for a run of stage 1 or 2."""
    lock = lock_to_resume(arguments, folder, reward_outputs, partial(record_path, folder), arguments["run_name"])
    if lock and lock.description:
        lock.description["wandb"]["name"] = lock.name  # the name in its files
    return lock


def _find_run(arguments: dict, folder: Path, outputs, record, name: str | None) -> tuple[RunLock | None, bool]:
    """The lock of the run to resume, and whether the run `name` is finished."""
    folders = [folder / f"state_{name}"] if name else list(folder.glob("state_*"))
    folders = [path for path in folders if path.is_dir()]
    refused = []
    for path in sorted(folders, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        run_name, recorded = path.name.removeprefix("state_"), _description(path).get("arguments")
        if recorded is None and (not name or record(name).exists()):
            continue  # no checkpoint, or already finished
        difference = None if recorded is None else _difference(recorded, arguments)
        if difference and list_checkpoints(path):
            refused.append(f"{path} was started with {difference}")
        elif not difference or name:
            try:
                lock = RunLock(folder, run_name, outputs(run_name), resume=True)
            except UserError as error:
                refused.append(str(error))
                continue
            if difference:  # it has no checkpoint, so it starts from the beginning with the new options
                lock.description = {}
            return lock, False
    recorded = read_json_or_empty(record(name)).get("arguments") if name and not refused else None
    if isinstance(recorded, dict):
        difference = _difference(recorded, arguments)
        if not difference:
            print(f"--resume: the run {name} is complete already ({record(name)})")
            _remove_temporaries(folder, re.compile(re.escape(f"state_{name}")))  # killed while it removed them
            return None, True
        refused.append(f"{name} is complete, and was started with {difference}")
    if name and refused:
        raise UserError(f"--resume: {refused[0]}; to start a new run, choose another name and leave out --resume")
    for reason in refused:
        print(f"--resume: skipped, {reason}")
    print(f"--resume: no unfinished run with these options in {folder}; starting from the beginning")
    return None, False


def _difference(recorded: dict, arguments: dict) -> str | None:
    """The first option that had another value, in words."""
    for name, value in json.loads(json.dumps(arguments, default=str)).items():
        if name not in _MAY_DIFFER and recorded.get(name) != value:
            return f"--{name} {recorded.get(name)}, not {value}"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `state_{name}/`, the newest last."""
    return sorted(folder.glob("step_*.pt"))


def _description(folder: Path) -> dict:
    """The content of `run.json`; empty if it is missing or malformed."""
    content = read_json_or_empty(folder / "run.json")
    wandb = content.get("wandb")
    try:
        valid = isinstance(content.get("arguments"), dict) and re.fullmatch(r"\w+", wandb["id"])
        return content if valid and file_name(wandb["name"]) else {}
    except (TypeError, KeyError, AttributeError, argparse.ArgumentTypeError):
        return {}


def _remove_temporaries(folder: Path, outputs: re.Pattern) -> None:
    """Removes unfinished files of these outputs."""
    for path in folder.glob(".*"):
        temporary = TEMPORARY.fullmatch(path.name)
        if temporary and outputs.fullmatch(temporary["name"]):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
