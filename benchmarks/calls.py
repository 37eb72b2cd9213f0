"""Recorded calls into CANDOR's layout: how much faster than real time, in how much memory, with how many smiles right.

    python benchmarks/calls.py [--minutes 5 30] [--workers 2]

First, what the face model says to the clips and to posed pictures, and how long it takes on one core.

Work: calls of two people, 30 frames a second, H.264 with x264's own distance of keyframes (up to 250 frames), whose
faces are parts of two real clips (downloaded from the package index). Each is converted by apps/calls in
its own process. Seconds of a call are counted once, although there are two videos.
"""

import argparse
import csv
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [
    str(ROOT),
    str(ROOT / "tests" / "apps" / "support"),
]  # and what makes calls for tests

from face_clips import CLIPS, PICTURES, clips
from recorded_calls import write_call

from apps.calls.video import pictures
from apps.faces import FACE_MODELS
from geli.data.candor import FACES, FEATURES_FILE
from geli.run.console import format_table

UNIT = 60  # seconds that are encoded; a call repeats them
SIZES = ((640, 360), (1280, 720))


def memory_of(process: psutil.Process) -> float:
    """Resident MiB of a process and its children."""
    total = 0
    try:
        for each in [process, *process.children(recursive=True)]:
            total += each.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total / 2**20


def convert(calls: Path, out: Path, workers: int) -> tuple[float, float, float]:
    """Runs the tool; returns seconds, seconds of CPU, and peak MiB."""
    command = [sys.executable, "-m", "apps.calls", str(calls), str(out), "--workers", str(workers)]
    before, start, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT) as tool:
        process = psutil.Process(tool.pid)
        while tool.poll() is None:
            peak = max(peak, memory_of(process))
            time.sleep(0.05)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert tool.returncode == 0
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak


def smiles_found(folder: Path, planted: dict[str, list[bool]]) -> float:
    """Percent of all seconds in which the most probable face is a smile exactly where one was planted."""
    with open(folder / FEATURES_FILE, newline="") as file:
        rows = list(csv.DictReader(file))
    right = 0
    for person, smiles in planted.items():
        shown = [[row[f"prob_face_{face}"] for face in FACES] for row in rows if row["user_id"] == person]
        found = [
            bool(cells[0]) and FACES[max(range(8), key=lambda i: float(cells[i]))] == "happiness" for cells in shown
        ]
        right += sum(a == b for a, b in zip(found, smiles, strict=True))
    return 100 * right / sum(map(len, planted.values()))


def read_faces() -> None:
    """Prints the face of every second of the clips, and of the pictures."""
    rows = []
    for name in (*CLIPS, *PICTURES):
        read, shown, seconds = FACE_MODELS["fer"].load(), [], 0.0
        for _, picture in pictures(clips() / name, 100):
            start = time.process_time()
            found = read(picture)
            seconds += time.process_time() - start
            shown.append("-" if found is None else f"{FACES[found.argmax()][:3]} {found.max():.2f}")
        row = {"file": name, "seconds": len(shown), "with a face": len(shown) - shown.count("-")}
        rows.append(row | {"CPU ms each": 1e3 * seconds / len(shown)})
        print(f"{name}: {', '.join(shown)}")
    print(format_table(rows), flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, nargs="+", default=[5, 30], help="lengths of the calls")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    args = parser.parse_args()
    read_faces()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for size in SIZES:
            for minutes in args.minutes:
                name = f"{size[1]}p-{minutes}"
                calls, out = Path(temporary, name), Path(temporary, f"{name}-candor")
                planted = write_call(calls / "call", UNIT, minutes * 60 // UNIT, size=size)
                seconds, cpu, peak = convert(calls, out, args.workers)
                row = {"picture": f"{size[0]}x{size[1]}", "minutes": minutes, "s": seconds, "CPU s": cpu}
                row |= {"times real time": 60 * minutes / seconds, "peak MiB": peak}
                rows.append(row | {"% of seconds right": smiles_found(out / "call", planted)})
                print(f"{name}: {seconds:.1f} s", flush=True)
    print(format_table(rows, f"\nCalls of two people, one frame a second each, {args.workers} processes"))


if __name__ == "__main__":
    main()
