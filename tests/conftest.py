"""Small corpora and models that the tests share; made once a session."""

import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
from accelerate.state import AcceleratorState
from apps_here import left_out
from browsers import browser, chromium  # noqa: F401 (fixtures)
from small_models import SMALL_WIDTH, small_model  # noqa: F401 (tests import them from here)

from geli.run.errors import run
from tools import sample_candor, tiny_models

# A shell starts `command &` with Ctrl-C ignored, and so would be every command that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = left_out()


class LeftOut(pytest.Dir):
    """The tests of an app that cannot run."""

    def collect(self):
        pytest.skip(LEFT_OUT[self.path])


def pytest_collect_directory(path: Path, parent) -> LeftOut | None:
    return LeftOut.from_parent(parent, path=path) if path in LEFT_OUT else None


def pytest_terminal_summary(terminalreporter) -> None:
    """Says what was left out and why, in a line for each app."""
    skipped = {ROOT / report.nodeid for report in terminalreporter.stats.get("skipped", ())}
    for folder in LEFT_OUT.keys() & skipped:
        terminalreporter.line(f"{folder.relative_to(ROOT)} is left out: {LEFT_OUT[folder]}", yellow=True)


def environment_of_its_own(**more: str) -> dict[str, str]:
    """The environment of a command that is started as a user does it: without this process' wandb service, and with the
    repository on its path, so that apps can be started in any folder."""
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return inherited | {"PYTHONPATH": str(ROOT)} | more


def program(command: str) -> list[str]:
    """The words that start a command: a script's path in the repository, or the name of an app such as `apps.chat`."""
    return [sys.executable, *(["-m", command] if command.startswith("apps.") else [str(ROOT / command)])]


def run_script(script: str, *arguments, cwd=None, check: int | None = 0, **environment):
    """Runs one of the commands as a user does; `check` is the exit code that is expected."""
    result = subprocess.run(
        [*program(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment_of_its_own(**environment),
    )
    if check is not None:
        assert result.returncode == check, f"{script} exited with {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def module_of(command: str) -> str:
    """The module that a command runs."""
    if command.startswith("apps."):
        return command if find_spec(command).submodule_search_locations is None else f"{command}.__main__"
    return command.removesuffix(".py").replace("/", ".")


def with_sizes(words, **sizes) -> list:
    """Options of stage 3 with small numbers for those of `sizes` that have an effect beside `words`: its command
    refuses others. Words that are given twice count as they stand last."""
    rl, evaluates = "--train" in words and "base" not in words, bool({"--val", "--generate"} & set(words))
    without = {"steps": rl, "learning_rate": rl, "val_prompts": evaluates}
    return [*(word for name, size in sizes.items() if without.get(name, True) for word in (f"--{name}", size)), *words]


def call_script(script: str, *arguments, check: int = 0):
    """As `run_script`, in this process, which saves the seconds of starting one; returns what it printed."""
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate allows one setting a process
    module, out, error, code = importlib.import_module(module_of(script)), io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            if hasattr(module, "parse_options"):
                run(partial(module.main, module.parse_options()))
            else:
                run(module.main)
        except SystemExit as exit_:
            code = exit_.code
    assert code == check, f"{script} exited with {code}\n{out.getvalue()}\n{error.getvalue()}"
    return subprocess.CompletedProcess(script, code, out.getvalue(), error.getvalue())


@pytest.fixture(scope="module", autouse=True)
def fresh_accelerator():
    """accelerate allows one precision in a process, and the file before may have run a command in another one."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """A sample corpus of 40 conversations: 36 for training, 4 for validation."""
    folder = tmp_path_factory.mktemp("sample") / "candor"
    sample_candor.write_corpus(folder, conversations=40, n_turns=14, seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny(sample) -> Path:
    """A small BART and a small Llama, trained for a few steps: enough to run, not to be any good."""
    folder = sample.parent / "models"
    tiny_models.build(sample, folder, ("bart", "llama"), seed=0, steps=12)
    return folder
