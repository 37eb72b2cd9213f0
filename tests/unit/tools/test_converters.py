"""Rated chats from a folder in CANDOR's layout, and back."""

import json

import pandas as pd
import pytest
from conftest import ROOT

from data_utils import read_corpus
from geli.data.candor import FACES
from geli.data.chats import ChatFiles
from geli.run.errors import UserError
from tools.converters import convert
from tools.writer import write_conversation

DSTC9 = ROOT.parent / "shared" / "data" / "dstc9"
LONG = "well, this is a turn of more than six words"


def seen(corpus):
    """What must survive: who said what when, and the scores."""
    said = {c.id: [(t.speaker, t.start, t.utterance) for t in c.turns] for c in corpus.conversations}
    return said, {t.key: (t.user, t.score) for both in corpus.trajectories.values() for t in both}


def test_a_folder_becomes_chats_and_comes_back(sample, tmp_path):
    before = read_corpus(sample, "i_like_you")
    counted = convert("candor", sample, tmp_path / "chats.jsonl.gz")
    assert counted == (40, sum(len(c.turns) for c in before.conversations))
    assert (tmp_path / "chats.jsonl.gz").stat().st_mode & 0o777 == 0o600
    chats = read_corpus(tmp_path / "chats.jsonl.gz", "i_like_you")
    assert seen(chats) == seen(before)
    convert("rated-chats", tmp_path / "chats.jsonl.gz", tmp_path / "back")
    back = read_corpus(tmp_path / "back", "i_like_you")
    assert seen(back) == seen(before)
    # smiles are thumbs, and smiles again, where a turn is long enough to have a second in it
    smiles = {(c.id, t.turn_id) for c in before.conversations for t in c.turns if t.affect == FACES.index("happiness")}
    assert smiles == {(c.id, t.turn_id) for c in chats.conversations for t in c.turns if t.reaction == 1} != set()
    again = {(c.id, t.turn_id) for c in back.conversations for t in c.turns if t.affect == FACES.index("happiness")}
    assert again <= smiles and len(again) > 0.9 * len(smiles)
    with pytest.raises(UserError, match="exists already"):
        convert("candor", sample, tmp_path / "chats.jsonl.gz")


def test_faces_are_reactions_and_lost_ones_are_none(tmp_path):
    turns = [("a", 0.0, 4.0, LONG), ("b", 5.0, 9.0, LONG), ("a", 10.0, 14.0, LONG)]
    faces = [("b", 0.0, 4.0, "happiness"), ("a", 5.0, 9.0, "anger")]
    write_conversation(tmp_path / "in/c", turns, faces, {"a": {"overall_affect": 7}}, {("b", s) for s in range(10, 15)})
    convert("candor", tmp_path / "in", tmp_path / "chats.jsonl")
    header, line = map(json.loads, (tmp_path / "chats.jsonl").read_text().splitlines())
    assert header == {"format": "rated-chats", "rating_range": [0, 100]}
    assert [message.get("reaction") for message in line["messages"]] == [1, -1, None]
    assert line["ratings"] == {"a": {"overall_affect": 70}} and [m["time"] for m in line["messages"]] == [0, 5, 10]
    convert("rated-chats", tmp_path / "chats.jsonl", tmp_path / "out")
    (conversation,) = read_corpus(tmp_path / "out", "overall_affect").conversations
    assert [FACES[turn.affect] for turn in conversation.turns] == ["happiness", "sadness", "neutral"]
    assert conversation.unseen == (2,)


def test_ids_that_cannot_name_a_folder_become_numbers_and_labels_a_table(tmp_path):
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "turn_rating": 2}]
    lines = [{"id": name, "messages": said, "rating": 4} for name in ("../x", "y")]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    convert("rated-chats", tmp_path / "chats.jsonl", tmp_path / "out", (1, 5))
    ids = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert len(ids) == 2 and "y" in ids and any(name.startswith("chat-") for name in ids)
    table = pd.read_csv(tmp_path / "out" / "turn_labels.csv")
    assert set(table["conversation_id"]) == ids and table["label"].tolist() == [2, 2] == [*table["turn_id"] + 1]


@pytest.mark.slow
@pytest.mark.skipif(not DSTC9.is_dir(), reason="DSTC9's conversations are not beside this repository")
def test_the_whole_of_dstc9(tmp_path):
    assert convert("dstc9", DSTC9, tmp_path / "out.jsonl")[0] == 2193
    there = read_corpus(tmp_path / "out.jsonl", "overall_affect")
    here = read_corpus(DSTC9 / "chats.jsonl", "overall_affect", rating_range=(1, 5))
    scores = [{key: round(score, 9) for key, (_, score) in seen(corpus)[1].items()} for corpus in (there, here)]
    assert scores[0] == scores[1]
    chats = [chat for _, chat in ChatFiles([tmp_path / "out.jsonl"]).chats()]
    assert sum(turn.rating is not None for chat in chats for turn in chat.turns) == 1007
