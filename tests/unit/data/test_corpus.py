"""Reading a folder of conversations: order, what is dropped, links, processes."""

import subprocess
import sys

import pandas as pd
import pytest
from conftest import ROOT
from conversations import edit, write

from data_utils import read_corpus
from geli.data import corpus as corpus_module
from geli.data.corpus import read_conversations, split_key
from geli.run.errors import UserError

BREAKS = {
    "no transcript": (lambda f: (f / "transcription" / "transcript_cliffhanger.csv").unlink(), "no such file"),
    "no face column": (
        lambda f: edit(f, lambda t: t.drop(columns="prob_face_fear"), "audio_video_features.csv"),
        "audio_video_features.csv: no column prob_face_fear",
    ),
    "no survey": (lambda f: (f / "survey.csv").unlink(), "survey.csv: no such file"),
    "one speaker": (lambda f: edit(f, lambda t: t.assign(speaker="u")), "2 speakers are expected, 1 found"),
    "three speakers": (lambda f: edit(f, lambda t: t.assign(speaker=list("uvwu"))), "2 speakers are expected, 3 found"),
    "a column missing": (lambda f: edit(f, lambda t: t.drop(columns="utterance")), "no column utterance"),
    "a cell too many": (
        lambda f: (f / "survey.csv").write_text("user_id,overall_affect\nu,3,4\nv,5,6\n"),
        "more cells",
    ),
    "no words": (lambda f: edit(f, lambda t: t.assign(utterance="")), "no usable turn"),
    "an empty file": (lambda f: (f / "survey.csv").write_text(""), "survey.csv: not a readable CSV file"),
    "not UTF-8": (lambda f: (f / "survey.csv").write_bytes(b"user_id\n\xff\xfe\x00"), "not a readable CSV file"),
    "a user twice": (lambda f: twice(f), "more than one row of a user"),
}


def twice(folder):
    edit(folder, lambda t: pd.concat([t, t.iloc[:1]]), "survey.csv")


@pytest.mark.parametrize("kind", BREAKS)
def test_a_broken_conversation_is_dropped_with_its_reason(tmp_path, kind):
    damage, reason = BREAKS[kind]
    damage(write(tmp_path / "broken"))
    write(tmp_path / "good")
    corpus = read_corpus(tmp_path, "overall_affect")
    assert [c.id for c in corpus.conversations] == ["good"]
    assert reason in corpus.dropped["broken"]
    assert f"broken: {corpus.dropped['broken']}" in corpus.describe()


def test_nothing_usable_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"found no folder in it; candor/README.md says how"):
        read_corpus(tmp_path, "overall_affect")
    (tmp_path / "x").mkdir()
    with pytest.raises(
        UserError, match=r"found 1 folders, none usable: transcript_cliffhanger.csv: no such file \(1\)"
    ):
        read_corpus(tmp_path, "overall_affect")
    with pytest.raises(UserError, match="no such file or directory"):
        read_corpus(tmp_path / "nowhere", "overall_affect")


def test_the_hash_that_orders_conversations_is_fixed():
    # sha256("conversation-1"), so that everybody's validation conversations are the same
    assert split_key("conversation-1").startswith("413055e0cb3a")


@pytest.fixture
def folders(tmp_path):
    for i in range(12):
        write(tmp_path / "data" / f"conversation-{i}")
    (tmp_path / "data" / "broken").mkdir()
    return tmp_path / "data"


def test_many_folders_are_read_in_several_processes_with_the_same_result(folders, monkeypatch):
    one = read_conversations(folders)
    monkeypatch.setattr(corpus_module, "PARALLEL_FROM", 2)
    monkeypatch.setattr(corpus_module, "available_cores", lambda: 2)
    assert read_conversations(folders) == one
    assert len(one[0]) == 12 and list(one[1]) == ["broken"]


SCRIPT = """
open("started", "a").write("x")  # a process that imports this script runs this line too
import sys
sys.path.insert(0, {root!r})
from geli.data import corpus
corpus.PARALLEL_FROM, corpus.available_cores = 2, lambda: 2
print(len(corpus.read_conversations({folders!r})[0]))
"""


@pytest.mark.parametrize("how", ["script", "command"])
def test_processes_that_read_do_not_import_the_main_script(folders, tmp_path, how):
    script = SCRIPT.format(root=str(ROOT), folders=str(folders))
    (tmp_path / "script.py").write_text(script)
    arguments = ["script.py"] if how == "script" else ["-c", script]
    result = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("12\n", 0), result.stderr
    assert (tmp_path / "started").read_text() == "x"


def test_what_the_reading_processes_import_is_light():
    script = "import sys; import geli.data.candor; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "pandas", "transformers", "accelerate"} & set(result.stdout.split())
