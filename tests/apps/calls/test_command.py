"""`python -m apps.calls`: recorded calls with real faces, broken ones among them, through the whole command."""

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import filelock
import psutil
import pytest
from conftest import call_script, environment_of_its_own, program
from face_clips import WOMAN, clips_or_skip, write_video
from recorded_calls import die, write_call

from apps.calls import batch
from data_utils import LI_SIGNALS, SignalOptions, read_corpus
from geli.data.candor import FACES, read_conversation

TOOL = "apps.calls"
SMALL = (320, 180)
KILLS = int(os.environ.get("GELI_KILLS", "3"))  # at random moments; each costs the seconds of a start


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """(folder of three calls, call -> person -> whether the person smiles in each second)."""
    clips_or_skip()
    folder = tmp_path_factory.mktemp("calls") / "recorded"
    return folder, {f"call-{n}": write_call(folder / f"call-{n}", unit=15, seed=n, size=SMALL) for n in range(3)}


def contents(folder):
    """Path -> bytes of all files that are not hidden."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


@pytest.fixture(scope="module")
def converted(calls, tmp_path_factory):
    """(folder in CANDOR's layout, what the command printed)."""
    out = tmp_path_factory.mktemp("converted") / "candor"
    return out, call_script(TOOL, calls[0], out, "--workers", 1)


def classes(folder, person):
    """The most probable face in each second; None where it was lost."""
    with open(folder / "audio_video_features.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["user_id"] == person]
    cells = [[row[f"prob_face_{face}"] for face in FACES] for row in rows]
    return [max(zip(map(float, row), FACES, strict=True))[1] if row[0] else None for row in cells]


def test_smiles_are_in_the_seconds_in_which_they_were_put(calls, converted):
    for call, people in calls[1].items():
        for person, smiles in people.items():
            shown = classes(converted[0] / call, person)
            assert [face == "happiness" for face in shown] == smiles and any(smiles) and not all(smiles)


def test_the_three_commands_can_read_it(calls, converted):
    corpus = read_corpus(converted[0], "overall_affect")
    counts = corpus.counts()
    assert (counts["conversations"], counts["trajectories"], counts["dropped_conversations"]) == (3, 6, 0)
    assert counts["skipped_transcript_rows"] == {}
    trajectories = [t for part in corpus.trajectories.values() for t in part]
    assert {t.score for t in trajectories} == {80.0, 50.0}
    shares = LI_SIGNALS["face"].reactions(trajectories, SignalOptions()).strength
    assert 0 == shares.min() < shares.max()
    for trajectory in trajectories:  # a turn is as happy as its listener was in its seconds
        smiles = calls[1][trajectory.conversation.id][trajectory.user]
        for turn in (trajectory.conversation.turns[i] for i in trajectory.agent_turns):
            seconds = [smiles[s] for s in range(len(smiles)) if turn.start <= s <= turn.stop]
            assert turn.happy_share == pytest.approx(sum(seconds) / len(seconds))


def test_what_was_done_is_printed(calls, converted):
    out, result = converted
    row = result.stdout.splitlines()[1].split()
    turns = sum(len(read_conversation(out / call).turns) for call in calls[1])
    assert row == ["3", str(turns), "0", "0", str(3 * 2 * 15), "100"] and f"Written: {out}" in result.stdout


def test_a_second_run_leaves_finished_calls_alone_and_reads_new_ones(calls, converted, tmp_path):
    shutil.copytree(calls[0], tmp_path / "calls")
    shutil.copytree(converted[0], tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "call-1")
    (tmp_path / "out" / ".call-1.0123456789abcdef.tmp").mkdir()  # what a killed run left
    before = (tmp_path / "out" / "call-0" / "survey.csv").stat()
    printed = call_script(TOOL, tmp_path / "calls", tmp_path / "out", "--workers", 1).stdout
    assert printed.splitlines()[1].split()[:4:2] == ["1", "2"]
    assert (tmp_path / "out" / "call-0" / "survey.csv").stat() == before
    assert contents(tmp_path / "out") == contents(converted[0])
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.endswith(".tmp")]


def test_broken_calls_are_named_and_the_others_are_written_by_several_processes(calls, converted, tmp_path):
    source = tmp_path / "calls"
    shutil.copytree(calls[0], source)
    for name in ("cut", "nobody", "stranger", "silent"):
        shutil.copytree(source / "call-0", source / name)
    (source / "cut" / "ben.mp4").write_bytes((source / "cut" / "ben.mp4").read_bytes()[:1000])
    for person in ("ana", "ben"):
        write_video(source / "nobody" / f"{person}.mp4", (WOMAN, [None] * 15), size=SMALL)
    transcript = (source / "call-0" / "zoom.transcript.vtt").read_text()
    (source / "stranger" / "zoom.transcript.vtt").write_text(transcript.replace("Ben:", "Benjamin:"))
    (source / "silent" / "zoom.transcript.vtt").unlink()
    (source / "silent" / "gallery.mp4").touch()
    printed = call_script(TOOL, source, tmp_path / "out", "--workers", 2).stdout
    assert contents(tmp_path / "out") == contents(converted[0])
    left_out = [line for line in printed.splitlines() if line.startswith("Left out ")]
    for line, said in zip(left_out, [
        r"cut: ben\.mp4: cannot be read as a video",
        r"nobody: no face was found in any second of its videos; --no_video",
        r"silent: gallery\.mp4: expected one video of each of ana and ben",
        r"stranger: zoom\.transcript\.vtt: 'Benjamin' speaks \(\d+ cues\), expected only Ana Silva and ben",
    ], strict=True):  # fmt: skip
        assert re.match(f"Left out {said}", line)


def test_without_videos_the_next_utterance_gives_the_reaction(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "require", None)  # no package of videos or faces is needed
    monkeypatch.setattr(batch, "FACE_MODELS", None)
    for n in range(2):
        write_call(tmp_path / "calls" / f"call-{n}", videos=False, seed=n)
    call_script(TOOL, tmp_path / "calls", tmp_path / "out", "--no_video")
    corpus = read_corpus(tmp_path / "out", "overall_affect")
    assert corpus.counts()["trajectories"] == 4 and not corpus.dropped
    assert corpus.counts()["conversations_without_faces"] == 2
    trajectories = [t for part in corpus.trajectories.values() for t in part]
    assert LI_SIGNALS["sentiment"].reactions(trajectories, SignalOptions()).strength.max() > 0  # "really nice"


class FakeWhisper:
    """What faster-whisper's model does; both speak in turn."""

    def __init__(self, name):
        assert name == "small"

    def transcribe(self, path, vad_filter):
        starts = (1, 9) if path.endswith("ana.mp4") else (5, 12)
        return [SimpleNamespace(start=t, end=t + 2, text=f" word {t} a b c d ") for t in starts], None


@pytest.mark.parametrize("workers", [1, 2])
def test_a_call_without_a_transcript_is_transcribed(workers, calls, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace(WhisperModel=FakeWhisper))
    shutil.copytree(calls[0] / "call-0", tmp_path / "calls" / "call-0")
    (tmp_path / "calls" / "call-0" / "zoom.transcript.vtt").unlink()
    call_script(TOOL, tmp_path / "calls", tmp_path / "out", "--workers", workers)
    turns = read_conversation(tmp_path / "out" / "call-0").turns
    assert [(turn.speaker, turn.start, turn.utterance) for turn in turns] == [
        ("ana", 1, "word 1 a b c d"),
        ("ben", 5, "word 5 a b c d"),
        ("ana", 9, "word 9 a b c d"),
        ("ben", 12, "word 12 a b c d"),
    ]
    assert [face == "happiness" for face in classes(tmp_path / "out" / "call-0", "ana")] == calls[1]["call-0"]["ana"]


def test_a_worker_that_dies_ends_the_run_with_one_line(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "_watch_in_worker", die)
    error = call_script(TOOL, calls[0], tmp_path / "out", "--workers", 2, check=2).stderr
    assert re.search(r"a worker process was killed .* at one of .*call-0/ana\.mp4", error) and error.count("\n") == 1


def test_mistakes_are_answered_in_one_line(calls, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "broken" / "call").mkdir(parents=True)
    out = tmp_path / "out"
    for source, target, said in (
        ("nowhere", out, "expected a folder with a folder for each call"),
        ("empty", out, "found no folder in it"),
        ("broken", tmp_path / "broken" / "out", "is in the folder of the calls"),
        ("broken", tmp_path / "file", "expected a folder, found a file"),
        ("broken", out, "no call could be used; the reasons stand above"),
    ):
        error = call_script(TOOL, tmp_path / source, target, check=2).stderr
        assert said in error and error.count("\n") == 1
    with filelock.FileLock(out / batch.LOCK_FILE):
        assert "another process is writing calls" in call_script(TOOL, calls[0], out, check=2).stderr
    monkeypatch.setitem(sys.modules, "av", None)
    error = call_script(TOOL, calls[0], out, check=2).stderr
    assert "pip install -r apps/calls/requirements.txt" in error


# ---------------------------------------------------------------------------------------------------------------------
# Kills


class Run:
    """The command in a process group of its own."""

    def __init__(self, calls, out):
        command = [*program(TOOL), str(calls), str(out), "--workers", "2"]
        environment = environment_of_its_own(OMP_NUM_THREADS="1")
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **quiet)

    def alive(self):
        """Processes of its group that still run."""
        alive = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
            except (psutil.NoSuchProcess, ProcessLookupError, PermissionError):
                continue
        return alive

    def has_ended(self):
        """Whether all of them end within some seconds."""
        end = time.monotonic() + 20
        while self.alive() and time.monotonic() < end:
            time.sleep(0.1)
        return not self.alive()


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(calls, converted, tmp_path):
    rng, out, expected = random.Random(0), tmp_path / "out", contents(converted[0])
    start = time.monotonic()
    assert Run(calls[0], tmp_path / "whole").process.wait() == 0
    whole = time.monotonic() - start
    for kill in range(KILLS):
        run, finished = Run(calls[0], out), len(list(out.glob("call-*")))
        end = time.monotonic() + rng.uniform(0.1, 1) * whole
        while run.process.poll() is None and (time.monotonic() < end or kill % 2):
            if kill % 2 and len(list(out.glob("call-*"))) > finished:
                break  # one more call is finished, and others are under way
            time.sleep(0.01)
        run.process.kill()
        run.process.wait()
        assert run.has_ended()  # its workers end with it
        there = contents(out) if out.exists() else {}
        assert there.items() <= expected.items()
        assert len(there) == 5 * len({path.parts[0] for path in there})  # whole calls
        if len(there) == len(expected):
            shutil.rmtree(out)
    assert Run(calls[0], out).process.wait() == 0
    assert contents(out) == expected and not list(out.glob(".*.tmp"))


def test_ctrl_c_ends_it_at_once_and_keeps_what_was_finished(calls, converted, tmp_path):
    run = Run(calls[0], tmp_path / "out")
    end = time.monotonic() + 60
    while len(run.alive()) < 3 and run.process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does it: to all of them
    assert run.process.wait(timeout=60) in (130, 0) and run.has_ended()
    assert contents(tmp_path / "out").items() <= contents(converted[0]).items()
