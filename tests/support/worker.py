"""Runs commands in two forked processes that talk over gloo, so that modules are imported once.

Usage: worker.py LAUNCHES.json FOLDER. A launch is {"jobs": [...], "environment": {...}}. Its processes run the jobs one
after another: {"name", "script", "arguments"} with, if wanted, "environment" (variables for this job; null removes one)
and "dies_after" (a step after which process 1 kills itself). What a process saw of a job is written to
FOLDER/NAME.RANK.json, and the exit codes of all processes to FOLDER/codes.json.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from unittest import mock

for folder in (Path(__file__).parents[2], Path(__file__).parent):
    sys.path.insert(0, str(folder))

import pytest
import torch
from accelerate.state import AcceleratorState
from no_pictures import save_pixel
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: F401 (lazy there)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from geli.report import plots
from geli.run import tracking
from geli.run.checkpoint import Checkpointer


def run_job(script: str, arguments: list, environment: dict | None = None, dies_after: int | None = None) -> dict:
    """Runs a command in this process, with short responses in stage 3 and empty pictures.

    Returns:
        "printed": to stdout. "logged": what was given to wandb. "wandb_runs": how many were started.
    """
    printed, seen = io.StringIO(), {"logged": [], "wandb_runs": 0}

    def log(self, values: dict, step: int) -> None:
        seen["logged"].append({"step": step} | {name: float(x) for name, x in values.items() if isinstance(x, float)})

    def start(self, *arguments, start=tracking.Tracker._start) -> None:
        seen["wandb_runs"] += 1
        start(self, *arguments)

    def done(self, step: int, save: bool = False, done=Checkpointer.done) -> None:
        if step == dies_after and self.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        done(self, step, save)

    AcceleratorState._reset_state(reset_partial_state="RANK" not in os.environ)  # a launch keeps its process group
    variables, stdout = mock.patch.dict(os.environ), contextlib.redirect_stdout(printed)
    with variables, stdout, pytest.MonkeyPatch.context() as patch:  # `check_sharding` changes variables too
        for name, value in {"WANDB_MODE": "disabled", **(environment or {})}.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        patch.setattr(plots, "save", save_pixel)
        patch.setattr(tracking.Tracker, "_start", start)
        patch.setattr(tracking.Tracker, "log", log)
        patch.setattr(Checkpointer, "done", done)
        module = importlib.import_module(Path(script).stem)
        options = module.parse_options([*map(str, arguments), "--device", "cpu", "--dtype", "float32"])
        if hasattr(options, "ppo"):
            short = dataclasses.replace(options.ppo, min_new_tokens=6, max_new_tokens=12)
            options = dataclasses.replace(options, ppo=short)
        module.main(options)
    return {"printed": printed.getvalue(), **seen}


def run_jobs(jobs: list[dict], folder: Path) -> None:
    """Runs the jobs of a launch in this process."""
    for job in jobs:
        name = job.pop("name")
        (folder / f"{name}.{os.environ['RANK']}.json").write_text(json.dumps(run_job(**job)))
    torch.distributed.destroy_process_group()


def launch(jobs: list[dict], environment: dict, folder: Path) -> list[int]:
    """Runs the jobs in two processes; returns their exit codes, negative for a signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    workers = []
    for rank in ("0", "1"):
        workers.append(os.fork())
        if workers[-1] == 0:
            os.environ.update(environment, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            try:
                run_jobs(jobs, folder)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    return [os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers]


def main() -> None:
    """Starts the launches one after another."""
    folder = Path(sys.argv[2])
    for script in ("train_reward_LI_only", "train_reward_GELI", "train_rl_GELI"):
        importlib.import_module(script)
    get_checkpoint_conversion_mapping("bart")  # compiles all models' patterns, which takes a second
    codes = [launch(**request, folder=folder) for request in json.loads(Path(sys.argv[1]).read_text())]
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
