import pytest

from geli.data.words import count_words, surface


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", 0), ("  ", 0), ("one", 1), ("it's one – or\u00a0two", 5), ("안녕하세요 여러분", 2), ("...", 1), ("。", 1),
        ("コーヒー", 2),  # four letters, of which two are a sign for a long vowel
        ("昨日、don't stop", 3),
        ("３０人います", 3),  # a number, and four letters
        ("ไหม", 1),
        ("ความ รัก", 2),  # six letters, since a vowel sign above another letter is none
    ],
)  # fmt: skip
def test_words_by_hand(text, number):
    assert count_words(text) == number


@pytest.mark.parametrize(
    ("text", "found"), [("", (0, 0, 0)), ("Oh! Really?! Yes.", (3, 2, 1)), ("何？すごい！", (2, 1, 1))]
)
def test_what_is_on_the_surface_of_a_text(text, found):
    assert surface(text) == found
