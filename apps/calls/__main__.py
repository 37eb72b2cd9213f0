"""Writes recorded calls in CANDOR's layout, so that every command can read them.

    python -m apps.calls CALLS OUT

CALLS holds a folder for each call: a video of each person, a transcript and ratings.csv (docs/your-own-data.md). Faces
are read once a second, on this machine. Run it again to continue where it stopped.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from apps.calls.batch import CallOptions, Report, convert_calls
from apps.faces import FACE_MODELS
from geli.run.console import format_table
from geli.run.errors import UserError, one_line, run
from geli.run.options import new_parser, positive_int


def parse_options(argv: Sequence[str] | None = None):
    """The command line."""
    parser = new_parser("Write recorded calls in CANDOR's layout.")
    parser.add_argument("calls", type=Path, help="folder with a folder for each call")
    parser.add_argument("out", type=Path, help="folder to write one folder a call to (becomes --data_dir)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=positive_int, default=cores, help="processes (by default a core each)")
    parser.add_argument("--no_video", action="store_true", help="leave videos alone, for --li_signal sentiment")
    models = "; ".join(f"{name}: {model.help}" for name, model in FACE_MODELS.items())
    parser.add_argument("--face_model", choices=FACE_MODELS, default="fer", help=f"what reads faces: {models}")
    parser.add_argument(
        "--whisper_model", default="small", help="of faster-whisper (name or folder), for calls without a transcript"
    )
    return parser.parse_args(argv)


def describe(report: Report, out: Path) -> str:
    """What became of the calls: a table, and every call that was left out with its reason."""
    row = {"calls written": report.written, "turns": report.turns, "there before": report.already_there}
    row["left out"] = len(report.left_out)
    if report.seconds:
        row |= {"s of faces": report.seconds, "% found": 100 * report.faces / report.seconds}
    notes = [f"In transcripts: {number:,} {reason}." for reason, number in sorted(report.notes.items())]
    left_out = [f"Left out {one_line(f'{name}: {reason}')}" for name, reason in sorted(report.left_out.items())]
    return "\n".join([format_table([row]), *notes, *left_out, f"Written: {out}"])


def main(options) -> None:
    """Runs the command."""
    settings = CallOptions(options.workers, options.no_video, options.face_model, options.whisper_model)
    report = convert_calls(options.calls, options.out, settings)
    print(describe(report, options.out))
    if not report.written and not report.already_there:
        raise UserError(f"{options.calls}: no call could be used; the reasons stand above")


if __name__ == "__main__":
    run(partial(main, parse_options()))
