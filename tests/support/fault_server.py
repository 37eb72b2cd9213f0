"""Runs the commands in forked processes that die when they are told to, without paying for imports each time.

Reads a JSON request a line and answers with one. A request is {"shell": COMMAND}, {"together": [REQUEST, ...]}, or
{"script", "arguments", "log"} with one of
- {"step": n, "signal": s}: the signal s after the training step n,
- {"torn": name}: SIGKILL in the middle of writing a checkpoint or safetensors file to `name`, half of which is written,
- {"event": n}: SIGKILL at the n-th point of writing files: before and after each flush and rename, and in the middle
  of each checkpoint and safetensors file,
- {"seconds": s}: SIGKILL after that time.
A run that ends prints how many of these points there were, and the size of the largest checkpoint.
Started under `unshare`, it has mounts of its own.
"""

import atexit
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import safetensors.torch
import torch
from no_pictures import save_pixel
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: F401 (lazy there)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from geli.report import plots
from geli.run.checkpoint import Checkpointer
from geli.run.errors import run as run_main
from geli.run.files import TEMPORARY

# what the scripts load while they run; the scripts load our modules
HEAVY = (
    "accelerate.utils scipy.stats sklearn.metrics matplotlib.figure wandb transformers.optimization peft requests "
    "pandas.io.formats.csvs pandas.core.methods.to_dict pyarrow.pandas_compat peft.utils.transformers_weight_conversion"
)
SCRIPTS = "train_reward_LI_only train_reward_GELI train_rl_GELI"


def arm(event: int | None, torn: str | None, step: int | None, number: int) -> None:
    """Makes this process die at a point of writing files, or send itself the signal `number` after a step."""
    count, largest = 0, 0

    def reached(path: Path | None = None) -> bool:
        nonlocal count
        count += 1
        return count == event or (path is not None and path.name == torn)

    def watched(function):
        def wrapper(*arguments):
            for do in (lambda: None, lambda: function(*arguments)):
                result = do()
                if reached():
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapper

    def tearing(save):
        def wrapper(content, path, *arguments, **named):
            nonlocal largest
            save(content, path, *arguments, **named)
            if hasattr(path, "flush"):  # an open file
                path.flush()
                path = path.name
            path = Path(path)
            temporary = TEMPORARY.fullmatch(path.name)
            final = Path(temporary["name"] if temporary else path.name)
            largest = max(largest, path.stat().st_size if final.suffix == ".pt" else 0)
            if reached(final):
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return wrapper

    def done(self, at: int, save: bool = False, done=Checkpointer.done) -> None:
        if at == step:
            os.kill(os.getpid(), number)
        done(self, at, save)

    # under every name that a loaded module has for them, because most modules import them at the top
    saves = {id(save): tearing(save) for save in (safetensors.torch.save_file, torch.save)}
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in saves:
                setattr(module, name, saves[id(value)])
    os.fsync, os.replace = map(watched, (os.fsync, os.replace))
    Path.rename = watched(Path.rename)
    Checkpointer.done = done
    atexit.register(lambda: print(f"POINTS {count} LARGEST {largest}"))


def child(script: str, arguments: list[str], log: str, event=None, torn=None, step=None, signal=None, **_) -> None:
    """Runs the script as `python SCRIPT ARGUMENTS` does, with short responses in stage 3 and empty pictures."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [script, *arguments]
    arm(event, torn, step, signal)
    plots.save = save_pixel
    module, code = importlib.import_module(Path(script).stem), 0
    try:
        options = module.parse_options()
        if hasattr(options, "ppo"):
            short = dataclasses.replace(options.ppo, min_new_tokens=4, max_new_tokens=8)
            options = dataclasses.replace(options, ppo=short)
        run_main(lambda: module.main(options))
    except SystemExit as exit_:
        code = exit_.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(request: dict):
    """Starts the process of a request; the function that it returns waits for the answer."""
    began = time.monotonic()
    process = os.fork()
    if process == 0:
        child(**request)
    timer = threading.Timer(request.get("seconds", 600), lambda: os.kill(process, signal.SIGKILL))
    timer.start()

    def finish() -> dict:
        _, status = os.waitpid(process, 0)
        timer.cancel()
        output = Path(request["log"]).read_text(errors="replace")
        return {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - began, "output": output}

    return finish


def answer(request: dict) -> dict:
    """Does what a request asks for."""
    if "shell" in request:
        done = subprocess.run(request["shell"], shell=True, capture_output=True, text=True)
        return {"code": done.returncode, "output": done.stdout + done.stderr}
    if "together" in request:
        return {"together": [finish() for finish in [start(each) for each in request["together"]]]}
    return start(request)()


def main() -> None:
    """Answers requests until stdin ends."""
    for name in f"{HEAVY} {SCRIPTS}".split():
        importlib.import_module(name)
    get_checkpoint_conversion_mapping("bart")  # compiles all models' patterns, which takes a second
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
