"""The survey at the end of a conversation, and the ids of the people who answer it."""

import argparse
import re
import secrets

from geli.data.candor import ANSWER_LIMITS, REWARD_CLASSES
from geli.run.errors import UserError

PARTNER_PREFIX = "policy:"  # of the speaker ids of policies, which no person's id begins with
SCALE = {10: (1, 9), 1: ANSWER_LIMITS[1]}  # points per unit of the answer -> range that people are offered
QUESTIONS = {  # of `REWARD_CLASSES` -> what people are asked, with the meaning of the lowest and the highest answer
    "you_are_funny": ("How funny was your partner?", "not at all", "very"),
    "you_are_intelligent": ("How intelligent did your partner seem?", "not at all", "very"),
    "our_thoughts_synced_up_sr1": ("How well were you on the same wavelength?", "not at all", "completely"),
    "you_are_humble": ("How humble was your partner?", "not at all", "very"),
    "end_affect": ("How did you feel at the end of the conversation?", "very bad", "very good"),
    "overall_affect": ("How did you feel during the conversation, over all?", "very bad", "very good"),
    "overall_memory_rating": ("How good a memory will this conversation be?", "very bad", "very good"),
    "how_enjoyable": ("How much did you enjoy the conversation?", "not at all", "very much"),
    "i_like_you": ("How much did you like your partner?", "not at all", "very much"),
    "in_common": ("How much did you and your partner have in common?", "nothing", "very much"),
    "conversationalist": ("How good is your partner at conversation, among all you know?", "the worst", "the best"),
    "good_for_advice": ("How good would your partner's advice be, among all you know?", "the worst", "the best"),
    "you_are_quickwitted": ("How quick-witted was your partner?", "not at all", "very"),
    "you_are_competent": ("How competent did your partner seem?", "not at all", "very"),
    "you_are_kind": ("How kind was your partner?", "not at all", "very"),
    "you_are_friendly": ("How friendly was your partner?", "not at all", "very"),
    "you_are_warm": ("How warm was your partner?", "not at all", "very"),
}


def answer_range(question: str) -> tuple[int, int]:
    """The lowest and the highest answer to a question of `REWARD_CLASSES`."""
    return SCALE[REWARD_CLASSES[question]]


def question_text(question: str) -> str:
    """A question as people are asked it, with the range of its answers."""
    text, lowest, highest = QUESTIONS[question]
    low, high = answer_range(question)
    return f"{text} ({low}: {lowest} … {high}: {highest})"


def read_answer(question: str, text: str) -> float:
    """The answer that a person gave.

    Raises:
        UserError: for an unknown question, or an answer that is no number in its range.
    """
    if question not in REWARD_CLASSES:
        raise UserError(f"{question[:60]!r} is no question; the questions are {', '.join(REWARD_CLASSES)}")
    low, high = answer_range(question)
    number = float(text) if re.fullmatch(r"\d{1,3}(\.\d{1,3})?", text.strip(), re.ASCII) else -1.0
    if not low <= number <= high:
        raise UserError(f"{question}: a number from {low} to {high} is expected, not {text.strip()[:40]!r}")
    return number


def new_user_id() -> str:
    """A random id for a person."""
    return f"person-{secrets.token_hex(6)}"


def user_id(text: str) -> str:
    """A person's id as an option's value: it stands in CSV files, and must not be a policy's."""
    if not re.fullmatch(r"[\w.@+-]{1,64}", text):
        raise argparse.ArgumentTypeError(f"at most 64 letters, digits and . @ + - _ are expected, not {text[:80]!r}")
    return text


def partner_id(name: str) -> str:
    """The speaker id of a policy."""
    return PARTNER_PREFIX + re.sub(r"[^\w.-]+", "-", name)
