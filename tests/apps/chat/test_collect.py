"""Collected conversations: what is written is what was said, and the project's reader reads it."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from talks import LetterPolicy, ManualClock, say

from apps.chat import collect
from apps.chat.collect import Collection, person_frames, write_talk
from apps.chat.partner import Partner
from apps.chat.talk import Talk, as_transcribed
from data_utils import make_prompts, read_corpus
from geli.data.candor import FACES, read_conversation

SIX = "one two three four five six"  # words, from which on a face is read


def talk_of(*pairs: tuple[str, str], clock=None, answers=None, **settings) -> Talk:
    """A rated talk of (message, reply) pairs, whose person agreed."""
    policy = LetterPolicy(*(f"{reply}|" for _, reply in pairs))
    talk = Talk(
        Partner(policy, "it", tuned=True, context_turns=3), clock=clock or ManualClock(), agreed=True, **settings
    )
    for message, _ in pairs:
        say(talk, message)
    talk.answers |= {"overall_affect": 7} if answers is None else answers
    return talk


def faces_of(talk: Talk) -> list[str | None]:
    return [frame and FACES[frame.index(max(frame))] for frame in person_frames(talk)]


# ---------------------------------------------------------------------------------------------------------------------
# There and back


def test_a_collected_talk_is_read_as_it_was(tmp_path):
    talk = talk_of(("Hello, you", "Hi.\nHow are you?"), ("Fine", "  "), ("And you?", "Good"), user="ann")
    folder = Collection(tmp_path / "talks").store(talk)
    assert folder == tmp_path / "talks" / talk.id
    corpus = read_corpus(tmp_path / "talks", "overall_affect")
    assert corpus.dropped == {} and corpus.dropped_trajectories == {f"{talk.id}/1": "the user has no survey row"}
    (trajectory,) = corpus.trajectories[talk.id]
    assert (trajectory.user, trajectory.agent, trajectory.score) == ("ann", "policy:it", 70)
    read = [(turn.speaker, turn.utterance) for turn in trajectory.conversation.turns]
    assert read == [
        ("ann", "Hello, you"), ("policy:it", "Hi. How are you?"), ("ann", "Fine"), ("ann", "And you?"),
        ("policy:it", "Good"),
    ]  # fmt: skip
    prompts = make_prompts([trajectory], 3)
    seen = [turn.prompt for turn in talk.replies if turn.utterance]
    assert [prompt.text for prompt in prompts] == [prompt.text for prompt in seen]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pairs=st.lists(
        st.tuples(st.text(min_size=1).filter(as_transcribed), st.text().filter(lambda text: "|" not in text)),
        min_size=1, max_size=4,
    ),
    user=st.sampled_from(["a", "ann", "person-0"]),
)  # fmt: skip
def test_whatever_is_written_is_read_back(pairs, user, tmp_path_factory):
    talk = talk_of(*((f"{user},\n{message}", f"a{reply}") for message, reply in pairs), user=user)
    folder = tmp_path_factory.mktemp("one")
    write_talk(folder, talk)
    turns = read_conversation(folder).turns
    assert [turn.utterance for turn in turns] == [turn.utterance for turn in talk.turns if turn.utterance]
    assert all(after.start >= before.stop for before, after in pairwise(turns))


def test_files_are_for_their_owner_only(tmp_path):
    folder = Collection(tmp_path / "talks").store(talk_of(("a", "b")))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 6 and all(path.stat().st_mode & 0o077 == 0 for path in files)
    assert (tmp_path / "talks").stat().st_mode & 0o077 == 0


def test_an_existing_folder_stays_as_open_as_it_is(tmp_path):
    (tmp_path / "shared").mkdir(mode=0o755)
    Collection(tmp_path / "shared")
    assert (tmp_path / "shared").stat().st_mode & 0o077 == 0o055


def test_the_record_says_whom_the_person_talked_to(tmp_path):
    folder = Collection(tmp_path / "talks").store(talk_of(("a", "b"), base=True))
    about = json.loads((folder / "metadata.json").read_text())
    assert about.pop("collected").startswith("20")
    assert about == {
        "agreed": True, "policy": "it", "adapter": False, "context_turns": 3, "reward_head": None, "rewards": [],
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Faces


def test_reactions_become_the_listeners_face_of_their_reply(tmp_path):
    talk = talk_of(*[("hello", SIX)] * 4)
    talk.replies[1].reaction, talk.replies[2].reaction = "happiness", "sadness"
    turns = read_conversation(Collection(tmp_path).store(talk)).turns
    affects = [FACES[turn.affect] for turn in turns if turn.speaker == talk.agent]
    assert affects == ["neutral", "happiness", "sadness", "neutral"]
    assert [turn.happy_share for turn in turns if turn.speaker == talk.agent] == [0, 1, 0, 0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    waits=st.lists(st.tuples(*[st.floats(0, 3)] * 3), min_size=1, max_size=6),
    reactions=st.lists(st.sampled_from([None, "happiness", "sadness"]), min_size=6, max_size=6),
)
def test_a_reaction_is_never_that_of_another_reply(waits, reactions, tmp_path_factory):
    clock = ManualClock()
    policy = LetterPolicy(*[f"{SIX}|"] * len(waits))
    talk = Talk(Partner(policy, "it", tuned=True), clock=clock, agreed=True)
    for (reading, writing, generating), reaction in zip(waits, reactions, strict=False):
        clock.seconds += reading
        talk.writes()
        clock.seconds += writing
        talk.say("hello")
        stream = talk.reply()
        next(stream)
        clock.seconds += generating
        list(stream)
        talk.turns[-1].reaction = reaction
    folder = tmp_path_factory.mktemp("one")
    write_talk(folder, talk)
    affects = [FACES[turn.affect] for turn in read_conversation(folder).turns if turn.speaker == talk.agent]
    assert affects == [reaction or "neutral" for reaction in reactions[: len(waits)]]


def test_seconds_of_which_nothing_is_known_are_lost_and_the_conversation_is_read_all_the_same(tmp_path):
    talk = talk_of(("hello", SIX), ("again", SIX))
    assert set(faces_of(talk)) == {None}
    folder = Collection(tmp_path).store(talk)
    rows = (folder / "audio_video_features.csv").read_text().splitlines()[1:]
    assert all(row.endswith(8 * ",") for row in rows if row.startswith(talk.user)) and len(rows) == 6
    assert [turn.affect for turn in read_conversation(folder).turns] == [FACES.index("neutral")] * 4


def test_a_camera_sees_between_reactions_by_hand():
    clock = ManualClock()
    talk = talk_of(("hello", "a"), clock=clock)  # the reply is from 0.01 to 1.01
    for seconds, face in ((0, "anger"), (1, "fear"), (2, "surprise"), (3, None)):
        clock.seconds = seconds
        talk.see(face and [float(name == face) for name in FACES])
    clock.seconds = 2.5
    talk.writes()
    clock.seconds = 4
    talk.say("bye")
    assert faces_of(talk) == ["anger", "fear", "surprise", None, None]
    talk.turns[1].reaction = "happiness"  # of a reply that was read from 0.01 to 2.5
    assert faces_of(talk) == ["anger", "happiness", "happiness", None, None]


# ---------------------------------------------------------------------------------------------------------------------
# Finished, broken off, refused


@pytest.mark.parametrize(("pairs", "answers"), [
    ([("a", "b")], {}),  # not rated
    ([("a", "")], {"overall_affect": 3}),  # the policy said nothing
])  # fmt: skip
def test_what_was_broken_off_is_kept_apart_and_counted(pairs, answers, tmp_path):
    collection = Collection(tmp_path / "talks")
    collection.store(talk_of(("a", "b")))
    folder = collection.store(talk_of(*pairs, answers=answers))
    assert folder.parent == tmp_path / "talks" / ".broken_off" and (folder / "transcription").is_dir()
    assert collection.counts() == (1, 1)
    assert len(read_corpus(tmp_path / "talks", "overall_affect").conversations) == 1  # and not one is dropped
    assert read_corpus(tmp_path / "talks", "overall_affect").dropped == {}


def test_nothing_is_stored_without_consent_or_without_a_word(tmp_path):
    collection, talk = Collection(tmp_path / "talks"), talk_of(("a", "b"))
    talk.agreed = False
    with pytest.raises(ValueError, match="did not agree"):
        collection.store(talk)
    assert collection.store(talk_of()) is None and collection.counts() == (0, 0)


def test_a_conversation_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    collection = Collection(tmp_path / "talks")

    def fail(folder: Path, talk: Talk) -> None:
        (folder / "half").touch()
        raise RuntimeError

    monkeypatch.setattr(collect, "write_talk", fail)
    with pytest.raises(RuntimeError):
        collection.store(talk_of(("a", "b")))
    assert [path.name for path in (tmp_path / "talks").iterdir()] == [".broken_off"]


def test_consent_says_what_is_stored_where_and_how_it_is_deleted(tmp_path):
    text = Collection(tmp_path / "talks").consent_text("ann")
    for said in (
        str(tmp_path / "talks"),
        "under the id ann",
        ".broken_off",
        "Nothing is sent anywhere",
        "apps.chat.forget ann",
    ):
        assert said in text
