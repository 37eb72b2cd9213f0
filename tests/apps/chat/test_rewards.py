"""Rewards of a talk are those of training: equal to stage 3's scorer, turn by turn."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import small_model
from small_models import write_head
from talks import LetterPolicy, say

from apps.chat.partner import Partner
from apps.chat.talk import Talk
from geli import GELIReward

SAID = ("Hello there.", "Oh, really? I like\nit.", "日本語 🙂", "Bye")


@pytest.fixture(scope="module")
def encoder(sample, tmp_path_factory):
    return small_model("bart", tmp_path_factory.mktemp("encoder") / "bart", sample)


@pytest.fixture(scope="module", params=["default", "small_model_shrink", "rudder"])
def scorer(request, encoder):
    kind = {"redist_type": "RUDDER"} if request.param == "rudder" else {}
    head = write_head(encoder.parent / "heads", encoder, request.param, **kind)
    return GELIReward.load(head, device="cpu", cache_size=0)


def talk_of(scorer) -> Talk:
    partner = Partner(LetterPolicy(*(f"{text}|" for text in SAID)), "it", tuned=True, context_turns=3)
    talk = Talk(partner, scorer)
    for number in range(len(SAID)):
        say(talk, f"message {number}")
    return talk


def as_in_training(talk: Talk, scorer, replies: list[str]) -> list[float]:
    """By stage 3's scorer, each turn in its trajectory."""
    trajectory = tuple((turn.prompt.context, f"AI: {reply}") for turn, reply in zip(talk.replies, replies, strict=True))
    prompts = [turn.prompt._replace(trajectory=trajectory, position=i) for i, turn in enumerate(talk.replies)]
    return scorer.score(prompts, replies).tolist()


def test_rewards_are_those_of_stage_3(scorer):
    talk = talk_of(scorer)
    expected = as_in_training(talk, scorer, [turn.utterance for turn in talk.replies])
    assert talk.rewards() == pytest.approx(expected, abs=1e-6)
    assert len(set(talk.rewards())) == len(SAID)


def test_another_reply_is_scored_in_the_place_of_the_last(scorer):
    talk = talk_of(scorer)
    expected = as_in_training(talk, scorer, [*(turn.utterance for turn in talk.replies[:-1]), "I am sorry."])
    assert talk.reward_instead("I am\nsorry.") == pytest.approx(expected[-1], abs=1e-6)
    assert talk.rewards() == pytest.approx(as_in_training(talk, scorer, [t.utterance for t in talk.replies]), abs=1e-6)


def test_what_is_taken_back_has_no_reward(scorer):
    talk = talk_of(scorer)
    before = as_in_training(talk, scorer, [turn.utterance for turn in talk.replies])
    talk.undo()
    assert len(talk.rewards()) == len(SAID) - 1
    if not scorer.head.sequential:
        assert talk.rewards() == pytest.approx(before[:-1], abs=1e-6)
    while talk.turns:
        talk.undo()
    assert talk.rewards() == []


def test_threads_share_a_scorer(scorer):
    alone = talk_of(scorer).rewards()
    with ThreadPoolExecutor(4) as pool:
        together = [*pool.map(lambda _: talk_of(scorer).rewards(), range(4))]
    assert all(rewards == pytest.approx(alone, abs=1e-6) for rewards in together)
