"""Files and folders that appear whole or not at all."""

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from geli.run.console import is_main_process
from geli.run.errors import UserError, first_line

# names of unfinished files: `.{name}.{token}.tmp{suffix}`
TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.tmp(\.\w+)?")


def temporary_name(path: Path) -> Path:
    """A name beside `path` for a file or folder that is being written or removed."""
    return path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp{path.suffix}"


@contextmanager
def atomic_path(path: str | Path, every_process: bool = False, private: bool = False) -> Iterator[Path]:
    """Yields a temporary path to write to. On success the file is flushed to disk and renamed to `path`; on failure it
    is removed. In a run of several processes only the main process' file is kept, unless `every_process` is set.

    Args:
        private: whether only its owner can read it, as a file with text of conversations; else the umask decides, also
            where a library (safetensors) makes its files private.

    Raises:
        UserError: if it cannot be written, as on a full disk.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with _write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if private:
                temporary.touch(mode=0o600)
            yield temporary
            if not private:
                _share(temporary)
            if every_process or is_main_process():
                _flush(temporary)
                os.replace(temporary, path)
                _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, private: bool = False) -> Iterator[Path]:
    """As `atomic_path`, for a folder, which one process alone writes; the files of a `private` one keep the modes that
    they are written with. An existing folder is renamed away, replaced, and then removed."""
    path = Path(path)
    temporary, old = temporary_name(path), None
    try:
        with _write_errors(path):
            temporary.mkdir(parents=True)
            yield temporary
            for written in [*temporary.rglob("*"), temporary]:
                if written.is_file() and not private:
                    _share(written)
                _flush(written)
            if path.exists():
                old = temporary_name(path)
                path.rename(old)
            temporary.rename(path)
            _flush(path.parent)
    finally:
        if old and not path.exists():
            old.rename(path)
        for leftover in (temporary, old):
            if leftover:
                shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Turns an operating system error into a `UserError` that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and "os error" not in str(error):  # as libraries written in Rust report it
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: could not be written ({reason}); an earlier version of it is unchanged") from error


def _share(path: Path) -> None:
    """Gives a file the mode that the umask gives to new files."""
    umask = os.umask(0o077)
    os.umask(umask)
    with suppress(OSError):  # a file system without modes; a file that was not written
        path.chmod(0o666 & ~umask)


def _flush(path: Path) -> None:
    """Writes a file's content, or a folder's entries, to the disk, so that they survive a loss of power."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def private_folder(path: Path) -> None:
    """Creates a folder that only its owner can read (where the file system has owners)."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(OSError):
        path.chmod(0o700)


def remove_stale_temporaries(folder: Path) -> None:
    """Removes unfinished files older than a day from a folder that several runs share."""
    for path in folder.glob(".*") if folder.is_dir() else ():
        with suppress(OSError):
            if TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > 24 * 3600:
                path.unlink()


def write_json(path: str | Path, value: object, private: bool = False) -> None:
    """Writes strict JSON (NaN is an error), as `atomic_path` does."""
    with atomic_path(path, private=private) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False, default=str) + "\n", encoding="utf-8")


def read_json_or_empty(path: Path) -> dict:
    """The JSON object in a file; {} if there is no such file or its content is anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def require_empty_folder(path: Path) -> None:
    """Raises a `UserError` unless `path` is an empty folder or does not exist."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: expected a new or empty folder, found files in it; name another or remove it")
