"""The survey at the end of a conversation, and the ids of the people who answer it."""

import argparse
import math
import re
import secrets

from geli.data.questions import QUESTIONS
from geli.run.errors import UserError

PARTNER_PREFIX = "policy:"  # of the speaker ids of policies, which no person's id begins with


def question_text(name: str) -> str:
    """A question of `QUESTIONS` as people are asked it, with the ends of its scale."""
    question = QUESTIONS[name]
    low, high = question.scale
    return f"{question.text} ({low}: {question.lowest} … {high}: {question.highest})"


def read_answer(question: str, text: str) -> float:
    """The answer that a person gave.

    Raises:
        UserError: for an unknown question, or an answer that is no number on its scale.
    """
    if question not in QUESTIONS:
        raise UserError(f"{question[:60]!r} is no question; the questions are {', '.join(QUESTIONS)}")
    low, high = QUESTIONS[question].scale
    number = float(text) if re.fullmatch(r"-?\d{1,3}(\.\d{1,3})?", text.strip(), re.ASCII) else math.nan
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
