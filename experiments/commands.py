"""Runs this repository's commands in processes of their own, for experiments that are made of many runs."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

from geli.run.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def run_command(folder: Path, script: str, *arguments) -> None:
    """Runs a command; what it prints goes to `folder`/log.txt.

    Args:
        script: its path in the repository, or the name of an app such as `apps.llm_shares`.

    Raises:
        UserError: if it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    with open(log, "a", encoding="utf-8") as file:
        start = ["-m", script] if script.startswith("apps.") else [str(ROOT / script)]
        command = [sys.executable, *start, *map(str, arguments)]
        print(f"$ {' '.join(command)}", file=file, flush=True)
        if subprocess.run(command, stdout=file, stderr=file, cwd=ROOT, check=False).returncode:
            raise UserError(f"{script} failed: see the end of {log}; the same command continues from what is finished")


def check_command(script: str, *arguments) -> None:
    """Ends the program, as the command would, if a command of a stage refuses its options. Runs nothing."""
    import_module(Path(script).stem).parse_options([str(argument) for argument in arguments])


def finished_head(folder: Path, run_name: str) -> Path | None:
    """The reward head of a finished stage-1 or stage-2 run under `folder`; None if there is none yet."""
    found = next(iter(folder.glob(f"*/reward1_{run_name}.json")), None)  # written last
    return found and found.with_suffix("")
