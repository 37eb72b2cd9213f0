"""A conversation with a policy: turns, history, times, taking back, reactions, ratings."""

from itertools import pairwise

import pytest
import torch
from talks import LetterPolicy, ManualClock, say

from apps.chat.partner import Partner
from apps.chat.talk import GAP, SHORTEST, Talk, TalkTurn
from data_utils import make_prompts, make_trajectory
from geli.data.candor import FACES, MOST_CHARACTERS, NEUTRAL, Conversation, Turn
from geli.run.errors import UserError


def talk_with(*replies: str, context_turns: int = 10, **settings) -> Talk:
    """A talk in which the policy says these replies."""
    policy = LetterPolicy(*(f"{reply}|" for reply in replies))
    return Talk(Partner(policy, "x/Llama 3", tuned=True, context_turns=context_turns), **settings)


def texts(talk: Talk) -> list[str]:
    return [("AI: " if turn.by_agent else "User: ") + turn.text for turn in talk.turns]


# ---------------------------------------------------------------------------------------------------------------------
# Saying and taking back


def test_messages_and_replies_alternate():
    talk = talk_with("Hello.", "Fine.")
    talk.say(" Hi! ")
    assert [*talk.reply()] == ["H", "He", "Hel", "Hell", "Hello", "Hello.", "Hello."]
    assert say(talk, "How are you?") == "Fine."
    assert texts(talk) == ["User: Hi!", "AI: Hello.", "User: How are you?", "AI: Fine."]


def test_undo_takes_back_the_message_and_its_reply():
    talk = talk_with("a", "b")
    say(talk, "one"), say(talk, "two")
    assert talk.undo() == "two"
    assert texts(talk) == ["User: one", "AI: a"]
    talk.say("three")  # without a reply yet
    assert (talk.undo(), talk.undo()) == ("three", "one")
    with pytest.raises(UserError, match="nothing has been said yet"):
        talk.undo()


def test_retry_replaces_the_last_reply():
    talk = talk_with("a", "b")
    say(talk, "one")
    talk.react("sadness")
    assert [*talk.retry()][-1] == "b"
    assert texts(talk) == ["User: one", "AI: b"] and talk.turns[-1].reaction is None


def test_a_reply_that_is_given_up_is_no_turn_and_can_be_asked_for_again():
    talk = talk_with("abc", "xyz")
    talk.say("one")
    assert next(talk.reply()) == "a"
    assert texts(talk) == ["User: one"] and [*talk.retry()][-1] == "xyz"


def test_the_other_policy_replies_to_the_same_state_with_the_same_numbers():
    talk = talk_with("abc", "abcd")
    say(talk, "one")
    assert [*talk.other_reply()][-1] == "...." and texts(talk) == ["User: one", "AI: abc"]
    first, second = talk.partner.policy.prompts
    assert first == second


def test_only_a_message_is_replied_to():
    talk = talk_with("a", "b")
    for last in ((), ("one",)):
        for text in last:
            say(talk, text)
        with pytest.raises(UserError, match="no message to reply to"):
            talk.reply()  # before anything is generated
    for ask in (talk_with().other_reply, lambda: talk_with().react("happiness")):
        with pytest.raises(UserError, match="there is no reply yet"):
            ask()


@pytest.mark.parametrize("text", ["", "  \n", "\0", "x" * (MOST_CHARACTERS + 1)])
def test_messages_that_no_transcript_can_have_are_refused(text):
    with pytest.raises(UserError, match="a message has 1 to 100,000 characters"):
        talk_with().say(text)


def test_what_is_no_text_is_replaced():
    talk = talk_with()
    talk.say("caf\udce9")
    assert talk.turns[0].text == "caf?"


def test_seeds_repeat_replies_and_talks_differ_without():
    numbers = []
    for settings in ({"seed": 3}, {"seed": 3}, {}, {}):
        talk = talk_with("a", **settings)
        say(talk, "one")
        numbers.append(talk.turns[-1].uniforms.tolist())
    assert numbers[0] == numbers[1] and numbers[1] != numbers[2] != numbers[3]


def test_ids_tell_people_and_policies_apart():
    talk, base = talk_with(), talk_with(base=True)
    assert talk.user != base.user and talk.id != base.id
    assert (talk.agent, base.agent) == ("policy:x-Llama-3", "policy:x-Llama-3-base")


# ---------------------------------------------------------------------------------------------------------------------
# History


def conversation_of(talk: Talk) -> Conversation:
    """The talk as readers of the data have it."""
    turns = [
        Turn(str(i), talk.agent if t.by_agent else talk.user, t.start, t.stop, t.utterance, 1, NEUTRAL, 0.0)
        for i, t in enumerate(talk.turns)
        if t.utterance  # they skip empty ones
    ]
    return Conversation("c", (talk.user, talk.agent), tuple(turns), {talk.user: {"end_affect": 5.0}}, frozenset())


@pytest.mark.parametrize("context_turns", [1, 3, 10])
def test_a_policy_reads_what_it_would_read_in_training(context_turns):
    talk = talk_with("Hi there.\n\nHow are you?", "", "Oh", "Yes", context_turns=context_turns)
    for text in ("Hello,\n you", "all fine", "日本語 🙂", "and\t<b>you</b>?"):
        say(talk, text)
    expected = make_prompts([make_trajectory(conversation_of(talk), False, "end_affect")], context_turns)
    found = [prompt for prompt, turn in zip(talk.partner.policy.prompts, talk.replies, strict=True) if turn.utterance]
    assert [(p.text, p.context, p.turns) for p in found] == [(p.text, p.context, p.turns) for p in expected]


def test_two_thousand_turns_of_history_are_windowed():
    talk = talk_with("last reply", context_turns=4)
    talk.turns += [TalkTurn(i % 2 == 1, f"turn {i}", float(i), i + 0.5) for i in range(2000)]
    say(talk, "last message")
    assert talk.partner.policy.prompts[0].turns == (
        (True, "turn 1997"), (False, "turn 1998"), (True, "turn 1999"), (False, "last message"),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Times


def test_times_come_from_the_clock_by_hand():
    clock = ManualClock()
    talk = talk_with("Hello.", "Fine.", clock=clock)
    clock.seconds = 2
    talk.writes()  # begins to write
    clock.seconds = 3
    talk.writes()  # goes on
    clock.seconds = 5
    talk.say("Hi")
    stream = talk.reply()
    clock.seconds = 6
    next(stream)  # the first letter
    clock.seconds = 9
    assert [*stream][-1] == "Hello."
    clock.seconds = 15  # it was read until then
    talk.writes()
    clock.seconds = 20
    say(talk, "How are you?")
    clock.seconds = 30
    talk.rate("end_affect", "7")
    assert [(turn.start, turn.stop) for turn in talk.turns] == [(2, 5), (6, 15), (15, 20), (20 + GAP, 30)]


def test_scripts_are_slowed_down_in_the_record_so_that_no_second_belongs_to_two_replies():
    talk = talk_with(*"abc", clock=ManualClock())
    for text in ("one", "two", "three"):
        say(talk, text)
    spans = [(turn.start, turn.stop) for turn in talk.replies]
    assert all(stop >= start + SHORTEST for start, stop in spans)
    assert all(later[0] >= before[1] + GAP for before, later in pairwise(spans))
    assert all(a.stop <= b.start for a, b in pairwise(talk.turns))


# ---------------------------------------------------------------------------------------------------------------------
# What the person thinks of it


def test_reactions_belong_to_the_last_reply_and_the_last_one_counts():
    talk = talk_with("a", "b")
    say(talk, "one")
    talk.react("happiness"), talk.react("sadness")
    say(talk, "two")
    assert [turn.reaction for turn in talk.replies] == ["sadness", None]
    with pytest.raises(ValueError, match="expected one of anger"):
        talk.react("joy")


def test_a_camera_gives_a_frame_a_second():
    clock = ManualClock()
    talk = talk_with(clock=clock)
    for seconds, face in ((0.2, "fear"), (1.4, "anger"), (1.9, "happiness"), (2.5, None)):
        clock.seconds = seconds
        talk.see(face and [float(name == face) for name in FACES])
    assert {second: frame and FACES[frame.index(1)] for second, frame in talk.frames.items()} == {
        0: "fear", 1: "happiness", 2: None,
    }  # fmt: skip


def test_the_last_answer_to_a_question_counts():
    talk = talk_with()
    talk.rate("end_affect", "3"), talk.rate("end_affect", " 7.5 "), talk.rate("good_for_advice", "99")
    assert talk.answers == {"end_affect": 7.5, "good_for_advice": 99}
    with pytest.raises(UserError):
        talk.rate("end_affect", "99")
    assert talk.answers["end_affect"] == 7.5


def test_without_a_scorer_there_are_no_rewards():
    talk = talk_with("a")
    say(talk, "one")
    assert talk.rewards() == [] and talk.turns[-1].features is None
    assert isinstance(talk.turns[-1].uniforms, torch.Tensor)
