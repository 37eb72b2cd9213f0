"""How many words a text has, also in languages that are written without spaces between them, and what else is on its
surface."""

import math

import regex  # `re` does not know scripts

_EAST_ASIAN = regex.compile(r"[[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}]&&\p{L}]", regex.V1)
_SOUTH_EAST_ASIAN = regex.compile(r"[[\p{Line_Break=SA}\p{Tibetan}]&&\p{L}]", regex.V1)  # SA: Thai, Lao, Khmer, …
_ANY = regex.compile(rf"(?:{_EAST_ASIAN.pattern}|{_SOUTH_EAST_ASIAN.pattern})\p{{M}}*", regex.V1)
_SPACED = regex.compile(r"\S*\w\S*")


def count_words(text: str) -> int:
    """Number of words, at least 1 unless the text is empty.

    Words are what stands between spaces. In scripts without spaces, where finding words takes a dictionary of the
    language, two letters of Chinese and Japanese count as a word, and three of Thai, Lao, Khmer, Burmese and Tibetan
    (vowel signs and tone marks are not letters), which is about the mean length of their words.
    """
    if text.isascii() or not (others := _ANY.subn(" ", text))[1]:
        return len(text.split())
    letters = len(_EAST_ASIAN.findall(text)) / 2 + len(_SOUTH_EAST_ASIAN.findall(text)) / 3
    return math.ceil(letters) + len(_SPACED.findall(others[0]))


SURFACE = ("words", "exclamation_marks", "question_marks")


def surface(text: str) -> tuple[int, int, int]:
    """How many words, exclamation marks and question marks a text has (`SURFACE`), which a reward can follow without
    any understanding of it."""
    return count_words(text), *(sum(map(text.count, marks)) for marks in ("!！", "?？"))
