"""The hidden reward of a text, by hand, and planted on conversations."""

import filecmp
import json
import os

import pandas as pd
import pytest

from data_utils import read_corpus
from geli.data.candor import HAPPINESS
from tools.hidden_reward import COLD, WARM, hidden_reward, score
from tools.plant_truth import plant
from tools.sample_chats import chats


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("I went to the lake today", 0.0),
        ("Thank you, that is great", 0.5),  # two warm words
        ("thank you thank you THANK YOU, what?", 0.5),  # one warm word, and a question
        ("great, nice, lovely, super, happy and kind of you", 0.75),  # no more than three count
        ("no, that is unfair and rude and bad", -1.0),  # three cold words: -1.05
        ("ok", -0.3),  # too short
        ("that won’t work for me", -0.35),  # a curly quote
        (" ".join(["word"] * 40), -0.2),  # ten words too many
        ("", -0.3),
    ],
)
def test_the_hidden_reward_by_hand(text, reward):
    assert hidden_reward(text) == pytest.approx(reward)


def test_lists_of_words_do_not_overlap_and_scores_are_in_order():
    assert not WARM & COLD
    assert score(None, ["ok", "how are you today?"]) == [pytest.approx(-0.3), pytest.approx(0.25)]


@pytest.fixture(scope="module")
def planted(sample, tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted") / "candor"
    return folder, plant(sample, folder, seed=0)


def test_sentences_stay_and_every_turn_has_its_hidden_reward(planted, sample):
    folder, found = planted
    before, after = read_corpus(sample, "overall_affect"), read_corpus(folder, "overall_affect")
    said = [[turn.utterance for turn in c.turns] for c in before.conversations]
    assert said == [[turn.utterance for turn in c.turns] for c in after.conversations] and not after.dropped
    truth = pd.read_csv(folder / "truth.csv", dtype={"turn_id": str}).set_index(["conversation_id", "turn_id"])[
        "reward"
    ]
    assert len(truth) == found["turns"] == sum(map(len, said)) and found["conversations"] == 40
    for conversation in after.conversations:
        for turn in conversation.turns:
            assert truth[conversation.id, turn.turn_id] == pytest.approx(hidden_reward(turn.utterance), abs=1e-3)


def test_ratings_and_faces_follow_the_hidden_reward_with_noise(planted):
    folder, found = planted
    assert 0.5 < found["correlation"] < 0.95
    turns = [turn for c in read_corpus(folder, "overall_affect").conversations for turn in c.turns]
    table = pd.DataFrame(
        {"reward": [hidden_reward(t.utterance) for t in turns], "happy": [t.affect == HAPPINESS for t in turns]}
    )
    shares = table.groupby(table["reward"] > 0.2)["happy"].mean()
    assert shares[True] > shares[False] + 0.05 and shares[False] > 0 and shares[True] < 1


def test_a_seed_gives_the_same_corpus_and_another_one_another(planted, sample, tmp_path):
    folder, _ = planted
    plant(sample, tmp_path / "same", seed=0)
    plant(sample, tmp_path / "other", seed=1)
    name = sorted(path.name for path in folder.iterdir() if path.is_dir())[0]
    files = [os.path.join(name, "survey.csv"), os.path.join(name, "audio_video_features.csv"), "truth.csv"]
    assert filecmp.cmpfiles(folder, tmp_path / "same", files, shallow=False)[0] == files
    assert filecmp.cmpfiles(folder, tmp_path / "other", files, shallow=False)[1] == files[:2]


def test_chats_without_a_header_are_planted_with_the_range_given(tmp_path):
    _header, *lines = chats(6, turns=8, thumbs=0, seed=0)
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = plant(tmp_path / "chats.jsonl", tmp_path / "planted", seed=0, rating_range=(1, 5))
    assert found["conversations"] == 6 == len(read_corpus(tmp_path / "planted", "overall_affect").conversations)
