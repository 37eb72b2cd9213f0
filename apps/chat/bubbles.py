"""A conversation as HTML: what was said, with a bar for each reward. All text is escaped."""

from html import escape

from apps.chat.survey import question_text
from apps.chat.talk import Talk, TalkTurn
from apps.chat.terminal import longest

REACTIONS = {"happiness": "🙂", "sadness": "☹️"}  # faces of `FACES` that people can react with


def conversation(
    talk: Talk, growing: str | None = None, column: int = 0, reactable: bool = False, title: str = ""
) -> str:
    """The turns of a conversation.

    Args:
        growing: the reply so far, if one is being made. column: of the page, which the buttons of reactions name.
        reactable: show these buttons under the last reply. title: stands above.
    """
    rewards, parts = iter(talk.rewards()), []
    scale = longest(talk.rewards())
    for turn in talk.turns:
        if not turn.by_agent:
            parts.append(_bubble("person", "You", turn.text))
            continue
        last = turn is talk.turns[-1] and growing is None
        below = "".join(reward_bar(reward, scale) for reward in [next(rewards, None)] if reward is not None)
        below += _reaction_buttons(turn, column) if last and reactable else _reaction(turn)
        parts.append(_bubble("agent", "AI", turn.text, below))
    if growing is not None:
        parts.append(_bubble("agent growing", "AI", growing))
    empty = '<p class="empty">Say something to begin.</p>'
    above = f"<h2>{escape(title)}</h2>" if title else ""
    return f'{above}<div class="turns" role="log">{"".join(parts) or empty}</div>'


def reward_bar(reward: float, scale: float) -> str:
    """A reward as a bar to the right of the middle, or to the left if it is negative, and a number.

    Args:
        scale: the reward of the longest bar.
    """
    width = min(50.0, 50 * abs(reward) / scale)
    sign, left = ("negative", 50 - width) if reward < 0 else ("positive", 50)
    return (
        f'<div class="reward {sign}" role="img" aria-label="reward {reward:+.3f}"><span class="track">'
        f'<span class="bar" style="left:{left:.1f}%;width:{width:.1f}%"></span></span> {reward:+.3f}</div>'
    )


def _bubble(kind: str, who: str, text: str, below: str = "") -> str:
    return f'<div class="turn {kind}"><span class="who">{who}</span><p>{escape(text)}</p>{below}</div>'


def _reaction(turn: TalkTurn) -> str:
    return f'<div class="reactions">{REACTIONS[turn.reaction]}</div>' if turn.reaction in REACTIONS else ""


def _reaction_buttons(turn: TalkTurn, column: int) -> str:
    buttons = (
        f'<button type="button" data-column="{column}" data-face="{face}" aria-label="{face}" '
        f'aria-pressed="{str(turn.reaction == face).lower()}">{sign}</button>'
        for face, sign in REACTIONS.items()
    )
    return f'<div class="reactions">{"".join(buttons)}</div>'


def text_block(text: str, kind: str = "") -> str:
    """A paragraph of text."""
    return f'<p class="{kind}">{escape(text)}</p>'


def question_block(question: str, optional: bool) -> str:
    """A question of the survey, with the range of its answers."""
    return text_block(question_text(question) + (" Optional." if optional else ""), "question")
