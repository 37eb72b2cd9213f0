"""Reading, aligning and splitting, each first on a case worked by hand."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data_utils
from candor_format import write_conversation
from cli import UserError
from data_utils import FACES, affect_of_turns, face_reactions, li_targets, sentiment_reactions

HAPPY, NEUTRAL, SAD, ANGRY = (FACES.index(name) for name in ("happiness", "neutral", "sadness", "anger"))


def frames(*shares):
    """(m, 8) probabilities from dicts of face -> probability."""
    return np.array([[share.get(face, 0.0) for face in FACES] for share in shares])


def test_a_turns_affect_is_the_most_frequent_argmax_of_its_listeners_frames():
    seconds = np.array([0.0, 1, 2, 3, 4])
    faces = frames(
        {"happiness": 0.9}, {"happiness": 0.6, "sadness": 0.4}, {"sadness": 0.9}, {"neutral": 1}, {"anger": 0.5}
    )
    # [0, 2]: happy, happy, sad -> happiness, 2/3; [2, 4]: sad, neutral, angry: one each, so the largest mean, neutral's
    affect, share = affect_of_turns([0, 2], [2, 4], [9, 9], seconds, faces)
    assert affect.tolist() == [HAPPY, NEUTRAL]
    assert share == pytest.approx([2 / 3, 0])


def test_ties_go_to_the_class_of_larger_mean_probability():
    faces = frames({"happiness": 0.6, "anger": 0.4}, {"anger": 0.7, "happiness": 0.1})
    # one frame each; mean of happiness 0.35, of anger 0.55
    assert affect_of_turns([0], [1], [6], np.array([0.0, 1.0]), faces)[0].tolist() == [ANGRY]


def test_both_ends_of_a_turn_belong_to_it():
    faces = frames({"happiness": 1}, {"neutral": 1}, {"neutral": 1})
    assert affect_of_turns([0.0], [0.9], [6], np.array([0.0, 1, 2]), faces)[0].tolist() == [HAPPY]
    assert affect_of_turns([0.1], [2.0], [6], np.array([0.0, 1, 2]), faces)[0].tolist() == [NEUTRAL]
    assert affect_of_turns([-1.0], [0.0], [6], np.array([0.0, 1, 2]), faces)[0].tolist() == [HAPPY]


def test_five_words_or_no_frame_make_a_turn_neutral():
    faces = frames({"happiness": 1}, {"happiness": 1})
    affect, share = affect_of_turns([0, 0, 5], [1, 1, 9], [5, 6, 20], np.array([0.0, 1.0]), faces)
    assert affect.tolist() == [NEUTRAL, HAPPY, NEUTRAL]
    assert share.tolist() == [0, 1, 0]


@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0, 20)), max_size=8), st.integers(0, 40), st.integers(0, 2**32 - 1)
)
def test_alignment_equals_looking_at_every_frame(spans, n_frames, seed):
    rng = np.random.default_rng(seed)
    seconds = np.sort(rng.integers(0, 60, size=n_frames)).astype(float)
    probabilities = rng.dirichlet(np.ones(8), size=n_frames)
    start = np.array([s for s, _ in spans])
    stop = np.array([s + d for s, d in spans])
    affect, share = affect_of_turns(start, stop, np.full(len(spans), 9), seconds, probabilities.reshape(-1, 8))
    for i in range(len(spans)):
        inside = probabilities[(seconds >= start[i]) & (seconds <= stop[i])]
        if not len(inside):
            assert (affect[i], share[i]) == (NEUTRAL, 0)
            continue
        classes = inside.argmax(axis=1)
        counts = np.bincount(classes, minlength=8)
        best = max(range(8), key=lambda c: (counts[c], inside[:, c].mean()))
        assert affect[i] == best
        assert share[i] == pytest.approx((classes == HAPPY).mean())


def test_targets_of_each_reaction_type_and_of_negative_affect():
    affects, shares = [HAPPY, NEUTRAL, SAD, ANGRY, FACES.index("surprise")], [0.7, 0.1, 0.2, 0.0, 0.3]
    faces = face_reactions(affects, shares)
    assert li_targets(faces).tolist() == [1, 0, 0, 0, 0]
    assert li_targets(faces, negative_affect="negative").tolist() == [1, 0, -1, -1, 0]
    assert li_targets(faces, "mean") == pytest.approx([0.7, 0.1, 0.2, 0.0, 0.3])
    assert li_targets(faces, "mean", "negative") == pytest.approx([0.7, 0.1, -1, -1, 0.3])


def test_targets_from_sentiment():
    said = sentiment_reactions(np.array([0.6, 0.04, -0.04, -0.3]))
    assert li_targets(said).tolist() == [1, 0, 0, 0]
    assert li_targets(said, negative_affect="negative").tolist() == [1, 0, 0, -1]
    assert li_targets(said, "mean") == pytest.approx([0.6, 0.04, 0, 0])
    assert said.labels.tolist() == [2, 1, 1, 0]


WORDS = "one two three four five six"


def write(folder, turns=None, faces=(), answers=None):
    """A conversation of u (who speaks first) and v with four turns, unless told otherwise."""
    turns = turns or [
        ("u", 0, 3, f"a {WORDS}"),
        ("v", 3, 6, f"b {WORDS}"),
        ("u", 6, 9, f"c {WORDS}"),
        ("v", 9, 12, "d"),
    ]
    answers = (
        {"u": {"overall_affect": 7, "conversationalist": 80}, "v": {"overall_affect": 4}}
        if answers is None
        else answers
    )
    write_conversation(folder, list(turns), list(faces), answers)
    return folder


def test_the_listener_is_the_other_person_whoever_speaks_first(tmp_path):
    # u smiles while v speaks (turn 1) and also while u speaks (turn 2): only the first is a reaction
    conversation = data_utils.read_conversation(write(tmp_path / "c", faces=[("u", 3.5, 8.5, "happiness")]))
    assert [turn.affect for turn in conversation.turns] == [NEUTRAL, HAPPY, NEUTRAL, NEUTRAL]


def test_two_trajectories_of_a_conversation(tmp_path):
    conversation = data_utils.read_conversation(write(tmp_path / "c"))
    straight, flipped = (data_utils.make_trajectory(conversation, flip, "overall_affect") for flip in (False, True))
    assert (straight.user, straight.agent, straight.score, straight.agent_turns) == ("u", "v", 70, (1, 3))
    assert (flipped.user, flipped.agent, flipped.score, flipped.agent_turns) == ("v", "u", 40, (0, 2))
    assert data_utils.make_trajectory(conversation, False, "conversationalist").score == 80  # already 0-100
    with pytest.raises(data_utils.Dropped, match="no usable answer to conversationalist"):
        data_utils.make_trajectory(conversation, True, "conversationalist")


def test_consecutive_turns_of_one_speaker_are_all_agent_turns(tmp_path):
    turns = [("u", 0, 1, "hi"), ("v", 1, 2, "x"), ("v", 2, 3, "y"), ("u", 3, 4, "z")]
    conversation = data_utils.read_conversation(write(tmp_path / "c", turns))
    assert data_utils.make_trajectory(conversation, False, "overall_affect").agent_turns == (1, 2)


def test_context_and_response_text(tmp_path):
    conversation = data_utils.read_conversation(write(tmp_path / "c"))
    context, response = data_utils.turn_text(conversation, 3, "u", 2)
    assert (
        context == f" AI: b {WORDS}  User: c {WORDS}"
    )  # the last two turns, each with its own space, joined by spaces
    assert response == "AI: d"
    assert data_utils.turn_text(conversation, 0, "v", 20) == ("", f"AI: a {WORDS}")


def test_what_people_say_stays_text(tmp_path):
    turns = [("u", 0, 1, "null"), ("v", 1, 2, "NA"), ("u", 2, 3, "1e5"), ("v", 3, 4, 'a "quote", and\na line')]
    conversation = data_utils.read_conversation(write(tmp_path / "c", turns))
    assert [turn.utterance for turn in conversation.turns] == ["null", "NA", "1e5", 'a "quote", and\na line']


def test_rows_that_are_no_turns_are_skipped_and_counted(tmp_path):
    folder = write(tmp_path / "c")
    path = folder / "transcription" / "transcript_cliffhanger.csv"
    table = pd.read_csv(path, dtype=str)
    extra = table.iloc[[0, 0, 0]].assign(
        turn_id=["4", "5", "6"], utterance=["  ", "words", "more words"], start=["1", "soon", "9"], stop=["2", "3", "8"]
    )
    pd.concat([table, extra]).to_csv(path, index=False)
    conversation = data_utils.read_conversation(folder)
    assert len(conversation.turns) == 4
    assert conversation.skipped_turns == {
        "empty utterance": 1,
        "start or stop is not a number": 1,
        "starts before 0 or stops before it starts": 1,
    }


def test_seconds_are_read_in_both_notations_and_lost_faces_dropped(tmp_path):
    faces = [("u", 3, 6, "happiness")]
    folder = write(tmp_path / "c", faces=faces)
    path = folder / "audio_video_features.csv"
    table = pd.read_csv(path)
    table["timedelta"] = pd.to_timedelta(table["timedelta"]).dt.total_seconds()
    table.loc[(table["user_id"] == "u") & (table["timedelta"] < 5), "prob_face_anger"] = np.nan  # half of them lost
    table.to_csv(path, index=False)
    assert data_utils.read_conversation(folder).turns[1].happy_share == pytest.approx(1.0)  # seconds 5 and 6 are left
    table.loc[table["user_id"] == "u", "prob_face_anger"] = np.nan
    table.to_csv(path, index=False)
    assert data_utils.read_conversation(folder).turns[1].affect == NEUTRAL


def corpus_of(tmp_path, n):
    for i in range(n):
        write(tmp_path / "data" / f"conversation-{i}")
    return data_utils.read_corpus(tmp_path / "data", "overall_affect")


@pytest.mark.parametrize(("n", "held_out"), [(2, 1), (19, 1), (40, 4)])
def test_small_corpora_hold_out_a_tenth_and_at_least_one(tmp_path, n, held_out):
    training, validation = data_utils.split(corpus_of(tmp_path, n), 1000)
    assert len({t.conversation.id for t in validation}) == held_out
    assert len({t.conversation.id for t in training}) == n - held_out


def test_five_hundred_conversations_hold_out_fifty():
    conversations = [data_utils.Conversation(str(i), ("u", "v"), (), {}, frozenset()) for i in range(500)]
    trajectories = {c.id: [data_utils.Trajectory(c, False, "u", "v", 1, 1, (0,))] for c in conversations}
    training, validation = data_utils.split(data_utils.Corpus(conversations, {}, {}, trajectories), 100)
    assert [t.conversation.id for t in validation] == [str(i) for i in range(450, 500)]
    assert [t.conversation.id for t in training] == [str(i) for i in range(100)]


def test_all_others_can_be_validated_on(sample):
    corpus = data_utils.read_corpus(sample, "overall_affect")
    training, validation = data_utils.split(corpus, 10)
    same, others = data_utils.split(corpus, 10, all_others=True)
    ids = [list(dict.fromkeys(t.conversation.id for t in part)) for part in (training, same, validation, others)]
    assert ids[0] == ids[1] and len(ids[2]) == 4 and len(ids[3]) == 30
    assert ids[3][-4:] == ids[2] and not set(ids[0]) & set(ids[3])


def test_splits_do_not_depend_on_the_folders_order_nor_overlap(tmp_path, monkeypatch):
    corpus = corpus_of(tmp_path, 30)
    expected = [[t.key for t in part] for part in data_utils.split(corpus, 10)]
    assert not {k.split("/")[0] for k in expected[0]} & {k.split("/")[0] for k in expected[1]}
    listed = data_utils.os.listdir(tmp_path / "data")
    for order in (sorted(listed), sorted(listed, reverse=True)):
        monkeypatch.setattr(data_utils.os, "listdir", lambda _, order=order: order)
        again = data_utils.read_corpus(tmp_path / "data", "overall_affect")
        assert [[t.key for t in part] for part in data_utils.split(again, 10)] == expected


def test_the_hash_that_orders_conversations_is_fixed():
    # sha256("conversation-1"), so that everybody's validation conversations are the same
    assert data_utils.split_key("conversation-1").startswith("413055e0cb3a")


BREAKS = {
    "no transcript": (lambda f: (f / "transcription" / "transcript_cliffhanger.csv").unlink(), "no such file"),
    "no faces": (lambda f: (f / "audio_video_features.csv").unlink(), "audio_video_features.csv: no such file"),
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
    "no face at all": (lambda f: lose_faces(f), "no frame with a face"),
    "a user twice": (lambda f: twice(f), "more than one row of a user"),
}


def edit(folder, change, name="transcription/transcript_cliffhanger.csv"):
    path = folder / name
    change(pd.read_csv(path, dtype=str)).to_csv(path, index=False)


def lose_faces(folder):
    edit(folder, lambda t: t.assign(prob_face_fear=""), "audio_video_features.csv")


def twice(folder):
    edit(folder, lambda t: pd.concat([t, t.iloc[:1]]), "survey.csv")


@pytest.mark.parametrize("kind", BREAKS)
def test_a_broken_conversation_is_dropped_with_its_reason(tmp_path, kind):
    damage, reason = BREAKS[kind]
    damage(write(tmp_path / "broken"))
    write(tmp_path / "good")
    corpus = data_utils.read_corpus(tmp_path, "overall_affect")
    assert [c.id for c in corpus.conversations] == ["good"]
    assert reason in corpus.dropped["broken"]
    assert f"broken: {corpus.dropped['broken']}" in corpus.describe()


def test_trajectories_without_an_answer_are_dropped_and_counted(tmp_path):
    write(tmp_path / "one-answers", answers={"u": {"overall_affect": 7}, "v": {}})
    write(tmp_path / "no-row", answers={"u": {"overall_affect": 7}})
    folder = write(tmp_path / "absurd")
    edit(folder, lambda t: t.assign(overall_affect=["700", "often"]), "survey.csv")
    corpus = data_utils.read_corpus(tmp_path, "overall_affect")
    assert corpus.dropped == {}
    assert corpus.dropped_trajectories == {
        "one-answers/1": "no usable answer to overall_affect",
        "no-row/1": "the user has no survey row",
        "absurd/0": "no usable answer to overall_affect",
        "absurd/1": "no usable answer to overall_affect",
    }


def test_nothing_usable_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"found no folder in it; candor/README.md says how"):
        data_utils.read_corpus(tmp_path, "overall_affect")
    (tmp_path / "x").mkdir()
    with pytest.raises(
        UserError, match=r"found 1 folders, none usable: transcript_cliffhanger.csv: no such file \(1\)"
    ):
        data_utils.read_corpus(tmp_path, "overall_affect")
    with pytest.raises(UserError, match="no such file or directory"):
        data_utils.read_corpus(tmp_path / "nowhere", "overall_affect")


def test_a_class_that_the_survey_lacks_names_those_present(tmp_path):
    folder = write(tmp_path / "c")
    edit(folder, lambda t: t[["user_id", "overall_affect", "i_like_you"]], "survey.csv")
    with pytest.raises(UserError, match="present: i_like_you, overall_affect"):
        data_utils.read_corpus(tmp_path, "you_are_kind")


@given(st.lists(st.integers(1, 200), min_size=1, max_size=300), st.integers(1, 64), st.integers(0, 99))
def test_batches_hold_every_index_once(lengths, size, seed):
    lengths = np.array(lengths)
    shuffled = data_utils.shuffled_batches(lengths, size, np.random.default_rng(seed))
    assert sorted(np.concatenate(shuffled)) == list(range(len(lengths)))
    assert max(map(len, shuffled)) <= size
    bounded = data_utils.token_batches(lengths, 128)
    assert sorted(np.concatenate(bounded)) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * lengths[batch].max() <= 128 for batch in bounded)
