"""What is said of LI targets before training."""

from dataclasses import replace

import pytest
from cases import case
from turn_sets import trajectory, turn_set

from data_utils import DataOptions, SignalOptions, load_turns
from geli.report.checks import check_li_targets
from geli.run.errors import UserError

FACE = SignalOptions(li_signal="face")


def seen(*faces: str, unseen: int = 0):
    """Agent turns with these faces of the listener, of which the first have no frame."""
    found = trajectory("a", 80.0, list(faces))
    conversation = replace(found.conversation, unseen=found.agent_turns[:unseen])
    return turn_set(replace(found, conversation=conversation))


def test_cases_how_many_have_a_reaction_and_how_many_differ_is_said(capsys):
    check_li_targets(seen("neutral", "happiness", "neutral", "neutral", unseen=1), FACE)
    assert capsys.readouterr().out == (
        "LI targets: 75% of the 4 turns of 6 words or more have a reaction (face); 25.0% of 4 targets differ from the "
        "commonest, 0\n"
    )


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        (
            seen("neutral", "neutral"),
            "all 2 LI targets are 0: --li_signal face found no reaction that differs",
        ),
        (seen("neutral", "neutral", "happiness", unseen=2), "Warning: --li_signal face has no reaction for most turns"),
    ],
)
def test_cases_what_is_unlikely_is_warned_of(turns, said, capsys):
    check_li_targets(turns, FACE)
    assert said in capsys.readouterr().out


def test_cases_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="--li_signal face: none of the 2 turns of 6 words or more has a reaction"):
        check_li_targets(seen("neutral", "neutral", unseen=2), FACE)


def test_cases_faces_in_milliseconds_are_refused():
    data = DataOptions(str(case("candor/ms")), transcript="audiophile", reward_class="overall_affect")
    with pytest.raises(UserError, match=r"no faces to learn from .* 1,000 times as late as the transcript's"):
        load_turns(data, FACE, cache=None, validate=False)
