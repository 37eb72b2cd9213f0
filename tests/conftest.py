"""Small corpora and small models that the tests share; made once a session, from nothing but this repository."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest

ROOT = Path(__file__).parent.parent


def run_script(script: str, *arguments, cwd=None, check: int | None = 0, **environment):
    """Runs one of the commands as a user does; `check` is the exit code that is expected."""
    result = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
    )
    if check is not None:
        assert result.returncode == check, f"{script} exited with {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """A sample corpus of 40 conversations: 36 for training, 4 for validation."""
    import sample_candor

    folder = tmp_path_factory.mktemp("sample") / "candor"
    sample_candor.write_corpus(folder, conversations=40, n_turns=14, seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny(sample) -> Path:
    """A small BART and a small Llama, trained for a few steps: enough to run, not to be any good."""
    from tiny_models import build

    folder = sample.parent / "models"
    build(sample, folder, ("bart", "llama"), seed=0, steps=12)
    return folder
