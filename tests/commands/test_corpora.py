"""CaSiNo in CANDOR's layout, and the sample corpus with its hidden rewards."""

import filecmp
import re

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, run_script
from scipy.stats import spearmanr

from data_utils import read_corpus, split
from geli.data.candor import FACES, read_conversation
from geli.run.errors import UserError
from tools import converters, sample_candor
from tools.converters import casino_dialogue
from tools.tiny_models import build
from tools.writer import write_conversation

CASINO = ROOT.parent / "shared" / "data" / "casino"


def message(person: int, text: str) -> dict:
    return {"text": text, "task_data": {}, "id": f"mturk_agent_{person}"}


DIALOGUE = {
    "dialogue_id": 7,
    "chat_logs": [
        message(2, "I would like to have all of the food 🙂"),  # before it there is no turn
        message(1, "😡🙂 no, I do need two of those food packages"),  # its first emoticon is 1's face during turn 0
        message(1, "and one water too if that is fine"),  # same speaker: shows nothing of a listener
        message(2, "☹️"),  # 2's face during turn 2; no text is left
        message(1, "well then, let us both take some of it"),
        message(2, "Submit-Deal"),
        message(1, "Accept-Deal"),
    ],
    "participant_info": {
        "mturk_agent_1": {"outcomes": {"satisfaction": "Undecided", "opponent_likeness": "Slightly like"}},
        "mturk_agent_2": {
            "outcomes": {"satisfaction": "Extremely dissatisfied", "opponent_likeness": "Extremely like"}
        },
    },
}


def test_a_dialogue_by_hand(tmp_path):
    new = casino_dialogue(DIALOGUE)
    write_conversation(tmp_path / new.id, new.turns, new.faces, new.answers)
    conversation = read_conversation(tmp_path / "casino-0007")
    turns = conversation.turns
    assert [turn.utterance for turn in turns] == [
        "I would like to have all of the food",
        "no, I do need two of those food packages",
        "and one water too if that is fine",
        "well then, let us both take some of it",
    ]
    assert [FACES[turn.affect] for turn in turns] == ["anger", "neutral", "sadness", "neutral"]
    # 9 words at 2.5 a second, then half a second
    assert (turns[0].start, turns[0].stop, turns[1].start) == (0, 3.6, 4.1)
    assert conversation.speakers == ("casino-0007-mturk_agent_2", "casino-0007-mturk_agent_1")
    first, second = (conversation.answers[user] for user in conversation.speakers)
    assert first == {"overall_affect": 9, "i_like_you": 9, "how_enjoyable": 1, "end_affect": 1}
    assert second == {"overall_affect": 7, "i_like_you": 7, "how_enjoyable": 5, "end_affect": 5}


@pytest.mark.slow
@pytest.mark.skipif(not CASINO.is_dir(), reason="CaSiNo's files are not beside this repository")
def test_the_whole_of_casino_is_usable(tmp_path):
    run_script("tools/convert_corpus.py", "casino", CASINO, tmp_path / "casino")
    corpus = read_corpus(tmp_path / "casino", "overall_affect")
    counts = corpus.counts()
    assert counts["conversations"] == 1030 and counts["dropped_conversations"] == 0
    assert counts["trajectories"] == 2060 and counts["turns"] == 11_919 - 9  # nine utterances are an emoticon alone
    assert counts["skipped_transcript_rows"] == {"empty utterance": 9}
    assert not any(
        emoticon in turn.utterance for c in corpus.conversations for turn in c.turns for emoticon in "🙂☹😡😮"
    )
    training, validation = split(corpus, 500)
    assert (len(training), len(validation)) == (1000, 100)


def test_noise_of_the_face_changes_faces_alone(tmp_path):
    for share in (0.0, 1.0):
        sample_candor.write_corpus(tmp_path / str(share), conversations=3, n_turns=24, seed=5, face_noise=share)
    files = {path.relative_to(tmp_path / "0.0"): path for path in (tmp_path / "0.0").rglob("*.csv")}
    changed = {p.name for p, path in files.items() if path.read_bytes() != (tmp_path / "1.0" / p).read_bytes()}
    assert changed == {"audio_video_features.csv"}


def test_a_seed_gives_the_same_sample_and_another_one_another(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        sample_candor.write_corpus(tmp_path / name, conversations=3, n_turns=12, seed=seed)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    same, different, missing = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)
    assert len(same) == len(files) == 1 + 3 * 5 and not different and not missing
    assert not {p.name for p in (tmp_path / "a").iterdir() if p.is_dir()} & {p.name for p in (tmp_path / "c").iterdir()}


@pytest.fixture(scope="module")
def planted(sample):
    """(turns with affect and hidden reward, trajectories with score and mean hidden reward) of the sample corpus."""
    corpus = read_corpus(sample, "overall_affect")
    truth = pd.read_csv(sample / "truth.csv", dtype={"turn_id": str}).set_index(["conversation_id", "turn_id"])
    turns, trajectories = [], []
    for t in (t for part in corpus.trajectories.values() for t in part):
        mine = [t.conversation.turns[i] for i in t.agent_turns]
        hidden = [truth.loc[(t.conversation.id, turn.turn_id), "reward"] for turn in mine]
        acts = [truth.loc[(t.conversation.id, turn.turn_id), "act"] for turn in mine]
        turns += [(FACES[turn.affect], act, worth) for turn, act, worth in zip(mine, acts, hidden, strict=True)]
        trajectories.append((t.score, np.mean(hidden)))
    return pd.DataFrame(turns, columns=["affect", "act", "hidden"]), np.array(trajectories)


def test_the_sample_is_sound_data(sample):
    counts = read_corpus(sample, "good_for_advice").counts()
    assert counts["conversations"] == 40 and counts["trajectories"] == 80
    assert counts["dropped_conversations"] == counts["dropped_trajectories"] == 0


def test_scores_follow_the_hidden_sum_but_not_exactly(planted):
    _, trajectories = planted
    assert 0.4 < np.corrcoef(trajectories.T)[0, 1] < 0.95


def test_faces_follow_the_hidden_reward_noisily_and_with_bias(planted):
    turns, _ = planted
    happy = turns["affect"] == "happiness"
    assert 0.1 < spearmanr(happy, turns["hidden"]).statistic < 0.7
    frowns = turns["affect"].isin(["anger", "contempt", "disgust", "fear", "sadness"])
    assert happy.mean() > 2 * frowns.mean()  # people smile more than they frown
    smiles = happy.groupby(turns["act"]).mean()
    assert smiles["joke"] > smiles["comfort"]  # although comfort is worth more


def test_no_training_script_knows_of_the_hidden_rewards():
    folders = ("*.py", "geli/**/*.py", "tools/*.py", "experiments/*.py", "apps/**/*.py")
    sources = [path for folder in folders for path in ROOT.glob(folder)]
    assert len(sources) > 30  # so that it looks into files that move
    readers = [path.name for path in sources if "truth.csv" in path.read_text()]
    evaluation = ["compare.py", "demo_report.py", "evaluate_rewards.py", "when_geli_helps.py"]
    loop = ["loop.py", "plant_truth.py"]
    assert sorted(readers) == sorted([*evaluation, "sample_candor.py", *loop])


@pytest.mark.slow
def test_small_models_are_the_same_every_time(sample, tmp_path):
    for name in ("a", "b"):
        build(sample, tmp_path / name, ("bart", "llama"), seed=0, steps=8)
    for file in ("bart/model.safetensors", "bart/tokenizer.json", "llama/model.safetensors", "llama/tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize(
    ("faces", "answers", "said"),
    [
        ([("a", 0.0, 1.0, "happy")], {}, "face class 'happy', expected one of anger"),
        ([], {"a": {"stars": 5}}, "survey question 'stars', expected one of"),
        ([], {"a": {"overall_affect": 80}}, "overall_affect: answer 80, expected 0 to 10"),
    ],
)
def test_what_candor_does_not_have_is_refused_when_it_is_written(faces, answers, said, tmp_path, monkeypatch):
    new = converters.NewConversation("c", [("a", 0.0, 1.0, "hi"), ("b", 1.0, 2.0, "hello")], faces, answers)
    monkeypatch.setitem(converters.CONVERTERS, "one", converters.Converter(lambda _: [new], (), "one"))
    with pytest.raises(UserError, match=re.escape(said)):
        converters.convert("one", tmp_path, tmp_path / "out")


def test_people_who_did_not_rate_have_faces(tmp_path):
    turns = [("a", 0.0, 4.0, "hi there, how are you today"), ("b", 5.0, 9.0, "I am very well, thank you")]
    write_conversation(tmp_path / "c", turns, [("b", 0.0, 4.0, "happiness")], {"a": {"overall_affect": 5}})
    conversation = read_corpus(tmp_path, "overall_affect").conversations[0]
    assert conversation.turns[0].affect == FACES.index("happiness")
