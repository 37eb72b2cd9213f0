"""What the training programs reach on a machine with one large GPU, in at most nine minutes.

    bash benchmarks/on_a_gpu.sh [FOLDER] [--minutes 9] [--parts ppo_7b encoding stages loop fsdp] [--toy]

Nothing is downloaded: models have the right shapes and random weights, and conversations are made up. TRL and wandb
need not be installed. Each part (`gpu_parts.py`) runs in a process of its own, so that one that fails or takes too long
does not stop the others; a part for which too little time is left is skipped. FOLDER (by default $OUT) gets
`on_a_gpu.json`, the table `on_a_gpu.md` for docs/speed.md, and what the parts printed, `on_a_gpu.log`. `--toy` tries
all of it at a small size, also on a CPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LEAST = {"ppo_7b": 60, "encoding": 30, "stages": 80, "loop": 110, "fsdp": 40}  # seconds, guessed: none was run yet
SCRIPT = Path(__file__).with_name("gpu_parts.py")


def run_part(name: str, options: argparse.Namespace, limit: float) -> dict:
    """What a part measured within `limit` seconds: {"status", "seconds", "rows", "numbers", "machine"}, the last three
    as far as it got."""
    environment = os.environ | {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, open(options.out / "on_a_gpu.log", "ab") as log:
        log.write(f"\n===== {name}\n".encode())
        log.flush()
        command = [sys.executable, str(SCRIPT), name, temporary]
        process = subprocess.Popen(
            command + ["--toy"] * options.toy, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            status = "measured" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)  # with the commands that it started
            process.wait()
        result = Path(temporary) / "result.json"
        found = json.loads(result.read_text()) if result.is_file() else {}
    if status == "failed":
        lines = (options.out / "on_a_gpu.log").read_text(errors="replace").strip().splitlines()
        status = f"failed: {lines[-1][:300]}"
    return {"status": status, "seconds": round(time.monotonic() - start, 1), **found}


def write(out: Path, parts: dict[str, dict], seconds: float) -> str:
    """Writes the JSON file and the table; returns the table."""
    machine = next((part["machine"] for part in parts.values() if "machine" in part), {})
    content = {"machine": machine, "seconds": round(seconds, 1), "parts": parts}
    device = machine.get("device", "not known")
    lines = ["| device | work | measured |", "|---|---|---|"]
    for name, part in parts.items():
        lines += [f"| {device} | {work} | {measured} |" for work, measured in part.get("rows", ())]
        if part["status"] != "measured":
            lines.append(f"| {device} | {name} | {part['status'].replace('|', '/')} |")
    for file, text in ("on_a_gpu.json", json.dumps(content, indent=1)), ("on_a_gpu.md", "\n".join(lines)):
        unfinished = out / f"{file}.tmp"
        unfinished.write_text(f"{text}\n")
        unfinished.replace(out / file)
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=os.environ.get("OUT"), help="folder (default: $OUT)")
    parser.add_argument("--minutes", type=float, default=9, help="time that all parts may take together (default: 9)")
    parser.add_argument("--parts", nargs="+", choices=LEAST, default=list(LEAST), help="which ones (default: all)")
    parser.add_argument("--toy", action="store_true", help="at a small size, to try it")
    options = parser.parse_args()
    if options.out is None:
        parser.error("expected a folder, or $OUT in the environment, found neither")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "on_a_gpu.log").write_bytes(b"")
    least = {name: 0 if options.toy else LEAST[name] for name in options.parts}
    start, parts = time.monotonic(), {}
    for place, name in enumerate(options.parts):
        left = options.minutes * 60 - (time.monotonic() - start)
        if left < max(least[name], 1):
            parts[name] = {"status": f"skipped: {left:.0f} s were left", "seconds": 0.0}
        else:  # each may take what those after it do not need
            later = sum(least[other] for other in options.parts[place + 1 :])
            parts[name] = run_part(name, options, max(least[name], left - later))
        print(f"{name}: {parts[name]['status']} ({parts[name]['seconds']} s)", flush=True)
        table = write(options.out, parts, time.monotonic() - start)
    print(f"\n{table}\n\nWritten to {options.out} in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
