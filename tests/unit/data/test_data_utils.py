"""Trajectories, LI targets, splits, texts and prompts, each first on a case worked by hand."""

import numpy as np
import pytest
from conversations import ANGRY, HAPPY, NEUTRAL, SAD, WORDS, edit, lose_faces, write

import data_utils
from data_utils import (
    NO_FACE,
    Corpus,
    DataOptions,
    SignalOptions,
    Trajectory,
    TurnSet,
    fingerprint,
    li_targets,
    load_prompts,
    load_turns,
    make_trajectory,
    rating_probability,
    reactions_of_faces,
    reactions_of_sentiments,
    read_corpus,
    split,
    turn_text,
    with_rating,
)
from geli.data import corpus as corpus_module
from geli.data.candor import FACES, Conversation, Dropped, read_conversation
from geli.data.questions import QUESTIONS, Question
from geli.run.errors import UserError


def test_targets_of_each_reaction_type_and_of_negative_affect():
    affects, shares = [HAPPY, NEUTRAL, SAD, ANGRY, FACES.index("surprise")], [0.7, 0.1, 0.2, 0.0, 0.3]
    faces = reactions_of_faces(affects, shares)
    assert li_targets(faces).tolist() == [1, 0, 0, 0, 0]
    assert li_targets(faces, negative_affect="negative").tolist() == [1, 0, -1, -1, 0]
    assert li_targets(faces, "mean") == pytest.approx([0.7, 0.1, 0.2, 0.0, 0.3])
    assert li_targets(faces, "mean", "negative") == pytest.approx([0.7, 0.1, -1, -1, 0.3])


def test_targets_from_sentiment():
    said = reactions_of_sentiments(np.array([0.6, 0.04, -0.04, -0.3]))
    assert li_targets(said).tolist() == [1, 0, 0, 0]
    assert li_targets(said, negative_affect="negative").tolist() == [1, 0, 0, -1]
    assert li_targets(said, "mean") == pytest.approx([0.6, 0.04, 0, 0])
    assert said.labels.tolist() == [2, 1, 1, 0]


def test_two_trajectories_of_a_conversation(tmp_path):
    conversation = read_conversation(write(tmp_path / "c"))
    straight, flipped = (make_trajectory(conversation, flip, "overall_affect") for flip in (False, True))
    assert (straight.user, straight.agent, straight.score, straight.agent_turns) == ("u", "v", 70, (1, 3))
    assert (flipped.user, flipped.agent, flipped.score, flipped.agent_turns) == ("v", "u", 40, (0, 2))
    assert make_trajectory(conversation, False, "conversationalist").score == 80  # already 0-100
    with pytest.raises(Dropped, match="no usable answer to conversationalist"):
        make_trajectory(conversation, True, "conversationalist")


def test_consecutive_turns_of_one_speaker_are_all_agent_turns(tmp_path):
    turns = [("u", 0, 1, "hi"), ("v", 1, 2, "x"), ("v", 2, 3, "y"), ("u", 3, 4, "z")]
    conversation = read_conversation(write(tmp_path / "c", turns))
    assert make_trajectory(conversation, False, "overall_affect").agent_turns == (1, 2)


def test_context_and_response_text(tmp_path):
    conversation = read_conversation(write(tmp_path / "c"))
    context, response = turn_text(conversation, 3, "u", 2)
    assert (
        context == f" AI: b {WORDS}  User: c {WORDS}"
    )  # the last two turns, each with its own space, joined by spaces
    assert response == "AI: d"
    assert turn_text(conversation, 0, "v", 20) == ("", f"AI: a {WORDS}")


def corpus_of(tmp_path, n):
    for i in range(n):
        write(tmp_path / "data" / f"conversation-{i}")
    return read_corpus(tmp_path / "data", "overall_affect")


@pytest.mark.parametrize(("n", "held_out"), [(2, 1), (19, 1), (40, 4)])
def test_small_corpora_hold_out_a_tenth_and_at_least_one(tmp_path, n, held_out):
    training, validation = split(corpus_of(tmp_path, n), 1000)
    assert len({t.conversation.id for t in validation}) == held_out
    assert len({t.conversation.id for t in training}) == n - held_out


def test_five_hundred_conversations_hold_out_fifty():
    conversations = [Conversation(str(i), ("u", "v"), (), {}, frozenset()) for i in range(500)]
    trajectories = {c.id: [Trajectory(c, False, "u", "v", 1, 1, (0,))] for c in conversations}
    training, validation = split(Corpus(conversations, {}, {}, trajectories), 100)
    assert [t.conversation.id for t in validation] == [str(i) for i in range(450, 500)]
    assert [t.conversation.id for t in training] == [str(i) for i in range(100)]


def test_all_others_can_be_validated_on(sample):
    corpus = read_corpus(sample, "overall_affect")
    training, validation = split(corpus, 10)
    same, others = split(corpus, 10, frozenset())
    ids = [list(dict.fromkeys(t.conversation.id for t in part)) for part in (training, same, validation, others)]
    assert ids[0] == ids[1] and len(ids[2]) == 4 and len(ids[3]) == 30
    assert ids[3][-4:] == ids[2] and not set(ids[0]) & set(ids[3])
    assert split(corpus, 10, frozenset(ids[3][:28]))[1] == [t for i in ids[3][28:] for t in corpus.trajectories[i]]


def test_splits_do_not_depend_on_the_folders_order_nor_overlap(tmp_path, monkeypatch):
    corpus = corpus_of(tmp_path, 30)
    expected = [[t.key for t in part] for part in split(corpus, 10)]
    assert not {k.split("/")[0] for k in expected[0]} & {k.split("/")[0] for k in expected[1]}
    listed = corpus_module.os.listdir(tmp_path / "data")
    for order in (sorted(listed), sorted(listed, reverse=True)):
        monkeypatch.setattr(corpus_module.os, "listdir", lambda _, order=order: order)
        again = read_corpus(tmp_path / "data", "overall_affect")
        assert [[t.key for t in part] for part in split(again, 10)] == expected


def test_trajectories_without_an_answer_are_dropped_and_counted(tmp_path):
    write(tmp_path / "one-answers", answers={"u": {"overall_affect": 7}, "v": {}})
    write(tmp_path / "no-row", answers={"u": {"overall_affect": 7}})
    folder = write(tmp_path / "absurd")
    edit(folder, lambda t: t.assign(overall_affect=["700", "often"]), "survey.csv")
    corpus = read_corpus(tmp_path, "overall_affect")
    assert corpus.dropped == {}
    assert corpus.dropped_trajectories == {
        "one-answers/1": "no usable answer to overall_affect",
        "no-row/1": "the user has no survey row",
        "absurd/0": "no usable answer to overall_affect",
        "absurd/1": "no usable answer to overall_affect",
    }


def test_answers_outside_their_limits_are_counted_with_an_example_and_what_to_do(tmp_path):
    for name, answers in (("a", ["60", "60"]), ("b", ["7", "60"]), ("c", ["", "8"])):
        edit(write(tmp_path / name), lambda t, a=answers: t.assign(overall_memory_rating=a), "survey.csv")
    corpus = read_corpus(tmp_path, "overall_affect")
    counts = corpus.counts()
    assert counts["answers_off_scale"] == corpus.numbers()["answers_off_scale"] == 3
    assert counts["answers_off_scale_by_question"] == {
        "overall_memory_rating": {"answers": 3, "example": 60, "limits": [0, 10]}
    }
    assert set(map(type, corpus.numbers().values())) == {int}  # for wandb: neither answers nor reasons
    assert corpus.describe().splitlines()[-1] == (
        "Left out 3 answers to overall_memory_rating that are not from 0 to 10, such as 60: if they are right, correct "
        "the question's row in geli/data/questions.py (docs/extending.md)."
    )


def test_a_question_whose_answers_are_all_outside_its_limits_is_an_error_that_says_so(tmp_path):
    edit(write(tmp_path / "c"), lambda t: t.assign(overall_memory_rating=["60", "70"]), "survey.csv")
    with pytest.raises(UserError, match=r"no usable answer to overall_memory_rating \(2\)\. Left out 2 .* as 60: if"):
        read_corpus(tmp_path, "overall_memory_rating")


def test_a_new_question_on_another_scale_is_a_row(tmp_path, monkeypatch):
    question = Question((1, 5), 20, "How closely did your partner listen?", "not at all", "very closely")
    monkeypatch.setitem(QUESTIONS, "listened", question)
    write(tmp_path / "c", answers={"u": {"listened": 4}, "v": {"listened": 1}})
    edit(tmp_path / "c", lambda t: t.assign(listened=["4", "6"]), "survey.csv")
    corpus = read_corpus(tmp_path, "listened")
    (trajectory,) = corpus.trajectories["c"]
    assert (trajectory.score, trajectory.answer) == (80, 4)
    assert "1 answers to listened that are not from 1 to 5, such as 6" in corpus.describe()


def test_a_class_that_the_survey_lacks_names_those_present(tmp_path):
    folder = write(tmp_path / "c")
    edit(folder, lambda t: t[["user_id", "overall_affect", "i_like_you"]], "survey.csv")
    with pytest.raises(UserError, match="present: i_like_you, overall_affect"):
        read_corpus(tmp_path, "you_are_kind")


# ---------------------------------------------------------------------------------------------------------------------
# Turn sets and prompts


def test_the_turns_of_a_set_lie_one_trajectory_after_the_other(tmp_path):
    write(tmp_path / "c", faces=[("u", 3, 6, "happiness")])
    (trajectories,) = read_corpus(tmp_path, "overall_affect").trajectories.values()
    turns = TurnSet.from_trajectories(trajectories, 1, SignalOptions("face"))
    assert turns.offsets.tolist() == [0, 2, 4] and turns.turns_of(1) == slice(2, 4) and len(turns) == 4
    assert turns.ids(range(4)) == ["c/0/1", "c/0/3", "c/1/0", "c/1/2"]
    assert turns.affects.tolist() == [HAPPY, NEUTRAL, NEUTRAL, NEUTRAL] == turns.labels.tolist()
    assert turns.targets.tolist() == [1, 0, 0, 0] and turns.scores.tolist() == [70, 40]
    assert turns.texts[0] == (f" User: a {WORDS}", f"AI: b {WORDS}")
    assert (
        turns.rated_texts()[0]
        == with_rating(turns.texts[0], 7)
        == (*turns.texts[0][:1], f"AI: b {WORDS} User's rating: 7")
    )


def test_the_sentiment_signal_reads_what_the_user_says_next(tmp_path):
    said = [("u", 0, 1, "so"), ("v", 1, 2, "a joke"), ("u", 2, 3, "great, I love it"), ("v", 3, 4, "a brag")]
    write(tmp_path / "c", said)
    trajectories = read_corpus(tmp_path, "overall_affect").trajectories["c"][:1]
    turns = TurnSet.from_trajectories(trajectories, 1, SignalOptions("sentiment"))
    assert turns.targets.tolist() == [1, 0]  # nobody reacts to the last turn
    assert turns.labels.tolist() == [2, 1]


@pytest.mark.parametrize("name", data_utils.LI_SIGNALS)
def test_a_signal_gives_one_reaction_a_turn(name, sample):
    trajectories = split(read_corpus(sample, "overall_affect"), 40)[0]
    n = sum(len(t.agent_turns) for t in trajectories)
    polarity, strength, labels, known = data_utils.LI_SIGNALS[name].reactions(
        trajectories, SignalOptions(name), False, trajectories
    )
    assert polarity.shape == strength.shape == labels.shape == known.shape == (n,)
    assert set(np.unique(polarity)) <= {-1, 0, 1} and np.issubdtype(labels.dtype, np.integer)
    assert 0 <= strength.min() <= strength.max() <= 1 and known.any() == (strength.max() > 0) == (name != "reaction")


def test_a_new_signal_is_a_function_and_a_row(tmp_path, monkeypatch):
    def length(trajectories, options, trust_remote_code, training):
        assert training == trajectories
        words = [t.conversation.turns[i].n_words for t in trajectories for i in t.agent_turns]
        return data_utils.reactions_of_sentiments(np.array(words) - 2.0)

    monkeypatch.setitem(data_utils.LI_SIGNALS, "length", data_utils.LISignal(length, "words of the turn"))
    write(tmp_path / "c")
    trajectories = read_corpus(tmp_path, "overall_affect").trajectories["c"]
    turns = TurnSet.from_trajectories(trajectories, 1, SignalOptions("length", negative_affect="negative"))
    assert turns.targets.tolist() == [1, -1, 1, 1]


def test_the_rating_is_shown_less_and_less_or_always_or_never():
    assert [rating_probability(True, True, epoch, 3) for epoch in (1, 2, 3)] == [1, 0.5, 0]
    assert rating_probability(True, False, 3, 3) == 1 and rating_probability(False, False, 1, 3) == 0
    assert rating_probability(True, True, 1, 1) == 1


def test_turns_are_loaded_as_the_options_say(sample, capsys):
    data = DataOptions(str(sample), context_turns=3, train_size=10)
    corpus, training, validation = load_turns(data, SignalOptions(), cache=None, validate=True)
    expected = split(corpus, 10)
    assert (training.trajectories, validation.trajectories) == expected
    assert training.texts == TurnSet.from_trajectories(expected[0], 3).texts
    printed = capsys.readouterr().out
    assert "Read 40 conversations" in printed and "training: 10 conversations, 20 trajectories" in printed
    everything = load_turns(DataOptions(str(sample), train_size=None), SignalOptions(), cache=None, validate=True)[1]
    assert len({t.conversation.id for t in everything.trajectories}) == 36


def test_nothing_to_train_or_validate_on_is_one_clear_error(tmp_path):
    write(tmp_path / "c")
    data = DataOptions(str(tmp_path))
    with pytest.raises(UserError, match="none of the training conversations has an answer to overall_affect"):
        load_turns(data, SignalOptions(), cache=None, validate=False)
    needs = dict(needs_training=False, needs_held_out=True)
    training, held_out, counts = load_prompts(data, cache=None, seed=0, val_prompts=9, **needs)
    assert not training and len(held_out) == 4 and counts["conversations"] == 1
    needs = dict(needs_training=True, needs_held_out=True)
    with pytest.raises(UserError, match="no training prompt in 1 conversations"):
        load_prompts(data, cache=None, seed=0, val_prompts=9, **needs)


# ---------------------------------------------------------------------------------------------------------------------
# Without faces


@pytest.fixture
def mixed(tmp_path):
    """Twenty conversations, of which every second one has no faces."""
    for i in range(20):
        write(tmp_path / "candor" / f"conversation-{i}", faces=[("u", 3, 6, "happiness")])
        if i % 2:
            lose_faces(tmp_path / "candor" / f"conversation-{i}")
    return tmp_path / "candor"


def test_conversations_without_faces_are_left_out_only_where_faces_are_learned(mixed):
    data, counted = DataOptions(str(mixed)), []
    for learns_li, signal in ((True, "face"), (True, "sentiment"), (False, "face")):
        corpus, training, validation = load_turns(
            data, SignalOptions(signal), cache=None, learns_li=learns_li, validate=False
        )
        counts = corpus.counts()
        assert (counts["conversations"], counts["conversations_without_faces"]) == (20, 10)
        assert "10 of the conversations have no faces" in corpus.describe()
        counted.append((counts["trajectories"], counts["dropped_trajectories_by_reason"]))
        assert len(training) + len(validation) == 2 * counts["trajectories"]
    reason = "no faces to learn from (audio_video_features.csv: no such file)"
    assert counted == [(20, {reason: 20}), (40, {}), (40, {})]
    needs = dict(needs_training=True, needs_held_out=True)
    training, held_out, _ = load_prompts(data, cache=None, seed=0, val_prompts=99, **needs)
    assert len(training) + len(held_out) == 80  # every turn of every conversation


def test_splits_are_the_same_whether_faces_are_needed_or_not(mixed):
    needed, anyway = (split(read_corpus(mixed, "overall_affect", needs_faces=x), 99) for x in (True, False))
    for some, every in zip(needed, anyway, strict=True):
        assert [t for t in every if not t.conversation.no_faces] == some


def test_turns_without_faces_have_no_affect_and_no_target_from_faces(mixed):
    trajectories = [t for part in read_corpus(mixed, "overall_affect").trajectories.values() for t in part]
    faces, words = (TurnSet.from_trajectories(trajectories, 1, SignalOptions(name)) for name in ("face", "sentiment"))
    faceless = np.repeat([bool(t.conversation.no_faces) for t in trajectories], 2)
    assert faceless.sum() == 40
    for turns in (faces, words):
        assert (turns.affects[faceless] == NO_FACE).all() and (turns.affects[~faceless] >= 0).all()
    assert np.array_equal(np.isnan(faces.targets), faceless) and not np.isnan(words.targets).any()


def test_only_conversations_without_faces_are_one_clear_error_for_face(tmp_path):
    lose_faces(write(tmp_path / "c"))
    with pytest.raises(UserError, match=r"can be used: no faces to learn from \(.*: no such file\) \(2\)"):
        read_corpus(tmp_path, "overall_affect", needs_faces=True)


def test_prompts_are_the_states_of_agent_turns(sample):
    data, needs = DataOptions(str(sample), context_turns=2), dict(needs_training=True, needs_held_out=True)
    training, held_out, _ = load_prompts(data, cache=None, seed=1, val_prompts=5, **needs)
    first = training[0]
    assert first.text == data_utils.prompt_text(first.context)
    assert first.trajectory[first.position] == (first.context, f"AI: {first.human}")
    assert len(held_out) == 5 and held_out == load_prompts(data, cache=None, seed=1, val_prompts=5, **needs)[1]
    assert held_out != load_prompts(data, cache=None, seed=2, val_prompts=5, **needs)[1]


def test_a_fingerprint_changes_with_what_was_read(tmp_path):
    write(tmp_path / "c")
    before = fingerprint(read_corpus(tmp_path, "overall_affect").trajectories["c"])
    edit(tmp_path / "c", lambda table: table.assign(utterance="other"))
    assert fingerprint(read_corpus(tmp_path, "overall_affect").trajectories["c"]) != before
