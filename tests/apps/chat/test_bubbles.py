"""Conversations as HTML: escaped, with bars of the right lengths."""

from types import SimpleNamespace

import pytest

from apps.chat.bubbles import conversation, question_block, reward_bar
from apps.chat.talk import TalkTurn

EVIL = "<script>alert(\"1\")</script> & 'x'"
SAFE = "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; &#x27;x&#x27;"


def talk_of(*texts: str, rewards=()) -> SimpleNamespace:
    """What a `Talk` shows, with messages and replies in turn."""
    turns = [TalkTurn(i % 2 == 1, text, i, i + 1) for i, text in enumerate(texts)]
    return SimpleNamespace(turns=turns, rewards=lambda: [*rewards])


@pytest.mark.parametrize(
    ("reward", "scale", "bar", "sign"),
    [
        (0.5, 1.0, "left:50.0%;width:25.0%", "positive"),
        (-0.5, 1.0, "left:25.0%;width:25.0%", "negative"),
        (-3.0, 3.0, "left:0.0%;width:50.0%", "negative"),
        (0.0, 1.0, "left:50.0%;width:0.0%", "positive"),
        (9.0, 1.0, "left:50.0%;width:50.0%", "positive"),
    ],
)
def test_a_bar_begins_in_the_middle(reward, scale, bar, sign):
    assert f'style="{bar}"' in reward_bar(reward, scale) and f'class="reward {sign}"' in reward_bar(reward, scale)
    assert reward_bar(reward, scale).endswith(f" {reward:+.3f}</div>")


def test_everything_is_escaped():
    html = conversation(talk_of(EVIL, EVIL), growing=None, title=EVIL)
    assert "<script" not in html and html.count(SAFE) == 3
    assert conversation(talk_of("Hi"), growing=EVIL).count(SAFE) == 1


def test_only_the_last_reply_has_buttons_and_earlier_reactions_stay():
    talk = talk_of("a", "b", "c", "d", rewards=[0.25, -2.0])
    talk.turns[1].reaction = "happiness"
    html = conversation(talk, column=1, reactable=True)
    first, last = html.split('<div class="turn person">')[1:]
    assert "🙂" in first and "<button" not in first and last.count('data-column="1"') == 2
    assert "width:6.2%" in first and "width:50.0%" in last  # of the longest, 2
    assert "<button" not in conversation(talk, growing="e", reactable=True)
    assert "<button" not in conversation(talk, reactable=False)
    talk.turns[3].reaction = "sadness"
    assert 'data-face="sadness" aria-label="sadness" aria-pressed="true"' in conversation(talk, reactable=True)


def test_without_a_head_there_are_no_bars():
    assert 'class="bar"' not in conversation(talk_of("a", "b"))


def test_questions_say_their_range():
    assert "(1: very bad … 9: very good) Optional.</p>" in question_block("overall_affect", optional=True)
    assert question_block("good_for_advice", optional=False).endswith("(0: the worst … 100: the best)</p>")
