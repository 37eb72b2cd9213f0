"""The cache of conversations is used if it holds what is asked for, and otherwise not."""

import multiprocessing
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conversations import edit, lose_faces, write

from data_utils import read_corpus
from geli.data import cache as cache_module
from geli.data import candor
from geli.data.cache import ConversationCache


@pytest.fixture
def data(sample, tmp_path) -> Path:
    """A dozen conversations that a test may change, and one that is dropped."""
    folder = tmp_path / "candor"
    for path in sorted(path for path in sample.iterdir() if path.is_dir())[:12]:
        shutil.copytree(path, folder / path.name)
    (folder / "broken").mkdir()
    return folder


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of the folders that were really read."""
    names, read = [], candor.read_conversation

    def count(folder, transcript):
        names.append(folder.name)
        return read(folder, transcript)

    monkeypatch.setattr(candor, "read_conversation", count)
    return names


def read(data, tmp_path, **options):
    return read_corpus(data, "overall_affect", cache=tmp_path / "cache", **options)


def test_what_was_read_is_read_once_and_is_the_same(data, tmp_path, reads):
    plain = read_corpus(data, "overall_affect")
    reads.clear()
    first, second = read(data, tmp_path), read(data, tmp_path)
    assert len(reads) == 14  # and the one that was dropped, again
    assert plain == first == second
    assert second.dropped.keys() == {"broken"}
    assert all(type(turn.start) is float and type(turn.affect) is int for c in second.conversations for turn in c.turns)


def test_a_changed_file_is_read_again_and_nothing_else_is(data, tmp_path, reads):
    before = read(data, tmp_path)
    name = before.conversations[3].id
    path = data / name / "survey.csv"
    table = pd.read_csv(path)
    table["overall_affect"] = 9
    stat = path.stat()
    table.to_csv(path, index=False)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # not even a file's own time hides the change
    reads.clear()
    after = read(data, tmp_path)
    assert set(reads) == {name, "broken"}
    assert {t.score for t in after.trajectories[name]} == {90}
    shutil.rmtree(data / name)
    shutil.copytree(data / before.conversations[0].id, data / "new")
    reads.clear()
    assert {c.id for c in read(data, tmp_path).conversations} == {c.id for c in before.conversations} - {name} | {"new"}
    assert set(reads) == {"new", "broken"}
    reads.clear()
    read(data, tmp_path)
    assert reads == ["broken"]


def test_what_is_known_of_faces_and_of_odd_answers_comes_back(data, tmp_path, reads):
    first, second = sorted(path for path in data.iterdir() if path.name != "broken")[:2]
    lose_faces(first)
    edit(second, lambda table: table.assign(overall_memory_rating=["60", "7"]), "survey.csv")
    right = read(data, tmp_path)
    reads.clear()
    again = read(data, tmp_path)
    assert again == right and reads == ["broken"]
    found = {c.id: c for c in again.conversations}
    assert "no such file" in found[first.name].no_faces and found[second.name].no_faces == ""
    assert found[second.name].off_scale == {"overall_memory_rating": [60]}
    write(first)  # the file appears
    reads.clear()
    assert not any(c.no_faces for c in read(data, tmp_path).conversations) and set(reads) == {first.name, "broken"}


def test_another_transcript_or_data_folder_has_a_cache_of_its_own(data, tmp_path, reads):
    read(data, tmp_path)
    for path in data.glob("*/transcription/transcript_cliffhanger.csv"):
        shutil.copy(path, path.with_name("transcript_audiophile.csv"))
    shutil.copytree(data, tmp_path / "copy")
    reads.clear()
    read(data, tmp_path, transcript="audiophile")
    read(tmp_path / "copy", tmp_path)
    assert len(reads) == 26


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "another reader"])
def test_a_damaged_or_stale_cache_is_not_used(data, tmp_path, reads, damage, capsys, monkeypatch):
    right = read(data, tmp_path)
    path = next((tmp_path / "cache").glob("*.cache"))
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 3] ^= 0xFF
    elif damage == "empty":
        content = b""
    elif damage == "text":
        content = b"hello"
    path.write_bytes(content)
    if damage == "another reader":
        monkeypatch.setattr(cache_module, "READER_VERSION", candor.READER_VERSION + 1)
    reads.clear()
    assert read(data, tmp_path) == right
    assert len(reads) == 13
    assert "is not used" in capsys.readouterr().out
    reads.clear()
    assert read(data, tmp_path) == right and reads == ["broken"]  # and it has been replaced


def test_the_cache_of_conversations_is_for_its_owner_only(data, tmp_path):
    read(data, tmp_path)
    assert [path.stat().st_mode & 0o077 for path in (tmp_path / "cache").iterdir()] == [0]


def _read_in_a_process(data, folder, queue):
    queue.put(len(read_corpus(data, "overall_affect", cache=folder).conversations))


@pytest.mark.slow
def test_runs_at_the_same_time_do_not_disturb_each_other(data, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (data, tmp_path / "cache", queue)
    processes = [context.Process(target=_read_in_a_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == [12] * 3
    for process in processes:
        process.join()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".cache"]
    kept = ConversationCache(tmp_path / "cache", data, "cliffhanger")
    assert kept.get("broken", kept.signature(data / "broken")) is None and len(kept._rows) == 12
