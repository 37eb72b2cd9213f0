"""Many recorded calls, in several processes; a run that was stopped goes on where it was."""

import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np

from apps.calls.calls import Call, read_call, seconds_of, turns_of_call, write_call
from apps.calls.transcripts import Utterance
from apps.calls.video import Tile, watch
from apps.faces import FACE_MODELS
from apps.packages import install, require
from geli.data.candor import Dropped
from geli.run.console import progress_bar
from geli.run.errors import UserError
from geli.run.files import TEMPORARY, private_folder

LOCK_FILE = ".calls.lock"
POLL = 0.5  # seconds between two updates of the progress bar


@dataclass(frozen=True)
class CallOptions:
    """How calls are read.

    Attributes:
        workers: processes. no_video: leave videos alone. face_model: a key of `FACE_MODELS`.
        whisper_model: of faster-whisper, for calls without a transcript.
    """

    workers: int = 1
    no_video: bool = False
    face_model: str = "fer"
    whisper_model: str = "small"


@dataclass
class Report:
    """What became of the calls.

    Attributes:
        written, already_there: numbers of calls. turns: of the calls that were written.
        seconds: of people's faces that were looked for. faces: of those, found.
        left_out: name of a call's folder -> reason.
        notes: what was left out of transcripts or completed -> how often.
    """

    written: int = 0
    already_there: int = 0
    turns: int = 0
    seconds: int = 0
    faces: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    notes: Counter = field(default_factory=Counter)


@dataclass
class Plan:
    """A call on its way: its turns (None: not transcribed yet), and the faces of the videos that were watched."""

    call: Call
    turns: list[Utterance] | None
    faces: dict[str, np.ndarray] = field(default_factory=dict)
    waiting: int = 0  # videos that are not watched yet


def convert_calls(source: Path, out: Path, options: CallOptions) -> Report:
    """Writes the calls in the folders of `source` to `out`, in CANDOR's layout. Those that are there are left alone.

    Raises:
        UserError: if there is no call, a package is missing, or another process writes to `out`.
    """
    folders = _folders(source, out)
    report = Report()
    with _locked(out):
        plans = _plans(folders, out, options, report)
        if any(plan.call.videos for plan in plans):
            require("av", "reading videos", install("calls"))
            FACE_MODELS[options.face_model].load()  # says at once what is missing
        total = sum(_seconds_to_watch(plan) for plan in plans)
        workers = max(1, min(options.workers, sum(len(plan.call.videos) for plan in plans)))
        with progress_bar(total=total, desc="reading calls", unit="s of video") as bar:
            jobs = _jobs(plans, out, options, report, bar)
            with closing(_watch_all(jobs, workers, bar.update)) as watched:
                for job, result in watched:
                    _finish_job(job, result, out, report)
    return report


def _plans(folders: Iterable[Path], out: Path, options: CallOptions, report: Report) -> list[Plan]:
    """A plan of each call that is not in `out` and can be used. Transcribing comes later, since it takes minutes."""
    plans = []
    for folder in progress_bar(folders, desc="reading transcripts", unit="call"):
        if (out / folder.name).is_dir():
            report.already_there += 1
            continue
        with _leaving_out(folder.name, report):
            call = read_call(folder, options.no_video)
            turns = None
            if call.transcript:
                turns, notes = turns_of_call(call, options.whisper_model)
                report.notes += notes
            plans.append(Plan(call, turns))
    return plans


class Job(NamedTuple):
    """A video to watch."""

    plan: Plan
    video: Path
    tiles: dict[str, Tile | None]
    face_model: str

    def arguments(self) -> tuple[Path, dict[str, Tile | None], int, str]:
        """What the process that watches it needs."""
        return self.video, self.tiles, seconds_of(self.plan.turns), self.face_model


def _jobs(plans: list[Plan], out: Path, options: CallOptions, report: Report, bar) -> Iterator[Job]:
    """The videos of all plans, in order; transcribes calls without a transcript, writes calls without videos."""
    for plan in plans:
        if plan.turns is None:
            with _leaving_out(plan.call.folder.name, report):
                plan.turns, _ = turns_of_call(plan.call, options.whisper_model)
                bar.total += _seconds_to_watch(plan)
        if plan.turns is None:
            continue
        plan.waiting = len(plan.call.videos)
        if not plan.waiting:
            _write(plan, out, report)
        yield from (Job(plan, video, tiles, options.face_model) for video, tiles in plan.call.videos.items())


def _seconds_to_watch(plan: Plan) -> int:
    return len(plan.call.videos) * seconds_of(plan.turns) if plan.turns else 0


def _finish_job(job: Job, result: dict[str, np.ndarray] | Dropped, out: Path, report: Report) -> None:
    """Keeps the faces of a video; writes its call if that was the last one."""
    plan = job.plan
    plan.waiting -= 1
    if isinstance(result, Dropped):
        report.left_out.setdefault(plan.call.folder.name, str(result))
    else:
        plan.faces.update(result)
    if plan.waiting == 0 and plan.call.folder.name not in report.left_out:
        _write(plan, out, report)
        plan.faces = {}


def _write(plan: Plan, out: Path, report: Report) -> None:
    with _leaving_out(plan.call.folder.name, report):
        write_call(out / plan.call.folder.name, plan.call, plan.turns, plan.faces)
        report.written += 1
        report.turns += len(plan.turns)
        report.seconds += sum(map(len, plan.faces.values()))
        report.faces += sum(int((~np.isnan(found[:, 0])).sum()) for found in plan.faces.values())


@contextmanager
def _leaving_out(name: str, report: Report) -> Iterator[None]:
    """A call that cannot be used is named in the report, and the others go on."""
    try:
        yield
    except Dropped as reason:
        report.left_out[name] = str(reason)
    except OSError as error:  # of reading: what cannot be written is a `UserError`
        report.left_out[name] = f"cannot be read ({(error.strerror or 'input/output error').lower()})"


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def _folders(source: Path, out: Path) -> list[Path]:
    """The folders of the calls, by name."""
    if not source.is_dir():
        raise UserError(f"{source}: expected a folder with a folder for each call, found none")
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out}: is in the folder of the calls; name another")
    folders = sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UserError(f"{source}: expected a folder for each call, found no folder in it")
    return folders


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Reserves `out`, however this process ends, and removes what an earlier one had not finished there."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: expected a folder, found a file")
    if not out.exists():
        private_folder(out)
    lock = filelock.FileLock(out / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"{out}: another process is writing calls to it") from None
    try:
        for path in out.iterdir():
            if TEMPORARY.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def _watch_all(
    jobs: Iterable[Job], workers: int, on_seconds: Callable[[int], object]
) -> Iterator[tuple[Job, dict[str, np.ndarray] | Dropped]]:
    """Watches videos in several processes (with one worker, in this one); yields each when it is finished.

    Args:
        on_seconds: is called with how many more seconds were watched.
    """
    if workers == 1:
        for job in jobs:
            yield job, _watch(*job.arguments(), on_seconds)
        return
    context = multiprocessing.get_context("spawn")  # a forked child of a process that has started threads can hang
    watched, stop, told = context.Value("q", 0), context.Event(), 0
    pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(watched, stop))
    waiting: dict[Future, Job] = {}
    try:
        more = iter(jobs)
        while True:
            for job in islice(more, 2 * workers - len(waiting)):
                with _ctrl_c_afterwards():
                    waiting[pool.submit(_watch_in_worker, *job.arguments())] = job
            if not waiting:
                return
            done, _ = wait(waiting, timeout=POLL, return_when=FIRST_COMPLETED)
            now = watched.value
            on_seconds(now - told)
            told = now
            for future in done:
                result = future.result()
                yield waiting.pop(future), result
    except BrokenProcessPool:
        started = ", ".join(str(job.video) for job in waiting.values())
        raise UserError(
            f"a worker process was killed (no memory left, or a video that FFmpeg cannot stand?) at one of {started}; "
            "the same command goes on"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_afterwards() -> Iterator[None]:
    """Has Ctrl-C wait while a pool starts its thread and processes, and hides it from these processes: a pool that is
    interrupted there, or whose processes are, cannot be shut down."""
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which the processes inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _watch(
    video: Path, tiles: dict[str, Tile | None], seconds: int, face_model: str, on_seconds: Callable[[int], object]
) -> dict[str, np.ndarray] | Dropped:
    """`watch`, with an error as a result. Calls `on_seconds` with `seconds` in all if there is none."""
    told = 0

    def tell(second: int) -> None:
        nonlocal told
        told, more = second + 1, second + 1 - told
        on_seconds(more)

    try:
        found = watch(video, tiles, seconds, face_model, tell)
        tell(seconds - 1)
        return found
    except Dropped as reason:
        return reason


_worker = None  # in a worker process: (seconds watched by all of them, whether to stop)


def _begin_worker(watched, stop) -> None:
    """Makes this process end with the one that started it, however that ends."""
    global _worker
    _worker = watched, stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _watch_in_worker(
    video: Path, tiles: dict[str, Tile | None], seconds: int, face_model: str
) -> dict[str, np.ndarray] | Dropped:
    watched, stop = _worker

    def on_seconds(more: int) -> None:
        with watched.get_lock():
            watched.value += more
        if stop.is_set():
            raise Dropped("stopped")

    return _watch(video, tiles, seconds, face_model, on_seconds)
