"""Runs the commands in forked processes that die when they are told to, without paying for imports each time.

Reads a JSON request a line and answers with one. A request is {"shell": COMMAND}, or {"script", "arguments", "log"}
with one of {"seconds": s} (SIGKILL after that time), {"event": n} (SIGKILL at the n-th step of writing a file: before
and after each flush and rename, and in the middle of each safetensors file), {"signal": [number, s]} or neither.
Started under `unshare`, it has mounts of its own.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
HEAVY = (
    "torch numpy pandas peft accelerate.utils safetensors.torch sklearn.metrics matplotlib.figure wandb transformers"
)
OURS = "evaluation cache published plots models ppo runs states train_reward_GELI train_reward_LI_only train_rl_GELI"


def arm(event: int | None) -> None:
    """Counts the steps of writing files from now on, and dies at number `event`; else tells the count at the end."""
    import atexit

    import safetensors.torch

    import runs

    count = 0

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

    def torn(tensors, path, *arguments, save_file=safetensors.torch.save_file, **named):
        save_file(tensors, path, *arguments, **named)
        if reached():
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    safetensors.torch.save_file = torn
    os.fsync, os.replace, runs._exchange = map(watched, (os.fsync, os.replace, runs._exchange))
    Path.rename = watched(Path.rename)
    atexit.register(lambda: print(f"EVENTS {count}"))


def child(script: str, arguments: list[str], log: str, event: int | None) -> None:
    """Runs the script as `python SCRIPT ARGUMENTS` does."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [script, *arguments]
    import cli

    arm(event)
    code = 0
    try:
        cli.run(importlib.import_module(Path(script).stem).main)
    except SystemExit as exit_:
        code = exit_.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    import atexit

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
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: F401 (lazy there)

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
