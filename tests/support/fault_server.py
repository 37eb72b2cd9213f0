"""Runs the commands in forked processes that die when they are told to, without paying for imports each time.

Reads a JSON request a line and answers with one. A request is {"shell": COMMAND}, or {"script", "arguments", "log"}
with one of {"seconds": s} (SIGKILL after that time), {"event": n} (SIGKILL at the n-th step of writing a file: before
and after each flush and rename, and in the middle of each safetensors file and checkpoint; a run that ends prints how
many steps there were, and which of them tear a file), {"signal": [number, s]} or
neither.
Started under `unshare`, it has mounts of its own.
"""

import atexit
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
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: F401 (lazy there)

from geli.run.errors import run as run_main

HEAVY = (
    "torch numpy pandas peft accelerate.utils safetensors.torch sklearn.metrics matplotlib.figure wandb transformers"
)
OURS = "train_reward_GELI train_reward_LI_only train_rl_GELI"  # they import all other modules of ours


def arm(event: int | None) -> None:
    """Counts the steps of writing files from now on, and dies at number `event`; else tells the count at the end."""
    count, torn_files = 0, []

    def reached() -> bool:
        nonlocal count
        count += 1
        return count == event

    def watched(function):
        def wrapper(*arguments):
            for do in (lambda: None, lambda: function(*arguments)):
                result = do()
                if reached():
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapper

    def torn(save):
        def wrapper(content, path, *arguments, **named):
            save(content, path, *arguments, **named)
            torn_files.append(count + 1)
            if reached():
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return wrapper

    # under every name that a loaded module has for them, because most are imported at the top of a file
    saves = {id(save): torn(save) for save in (safetensors.torch.save_file, torch.save)}
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in saves:
                setattr(module, name, saves[id(value)])
    os.fsync, os.replace = map(watched, (os.fsync, os.replace))
    Path.rename = watched(Path.rename)
    atexit.register(lambda: print(f"EVENTS {count} TORN {' '.join(map(str, torn_files))}"))


def child(script: str, arguments: list[str], log: str, event: int | None) -> None:
    """Runs the script as `python SCRIPT ARGUMENTS` does."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [script, *arguments]
    arm(event)
    module, code = importlib.import_module(Path(script).stem), 0
    try:
        run_main(lambda: module.main(module.parse_options()))
    except SystemExit as exit_:
        code = exit_.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(request: dict) -> dict:
    """One request."""
    if "shell" in request:
        done = subprocess.run(request["shell"], shell=True, capture_output=True, text=True)
        return {"code": done.returncode, "output": done.stdout + done.stderr}
    start = time.monotonic()
    process = os.fork()
    if process == 0:
        child(request["script"], request["arguments"], request["log"], request.get("event"))
    number, seconds = request.get("signal", [signal.SIGKILL, request.get("seconds")])
    timer = threading.Timer(seconds or 600, lambda: os.kill(process, number))
    timer.start()
    _, status = os.waitpid(process, 0)
    timer.cancel()
    code = os.waitstatus_to_exitcode(status)
    output = Path(request["log"]).read_text(errors="replace")
    return {"code": code, "seconds": time.monotonic() - start, "output": output}


def main() -> None:
    """Requests until stdin ends."""
    for name in f"{HEAVY} {OURS}".split():
        importlib.import_module(name)
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
