"""The questions of CANDOR's survey that can be the score of a conversation: one table, which every program reads."""

from typing import NamedTuple


class Question(NamedTuple):
    """A choice of `--reward_class`.

    Attributes:
        scale: the lowest and the highest answer that people are offered.
        points: of the score R for each unit of the answer, so that R is about 0 to 100.
        text: what people are asked. lowest, highest: what the two ends of the scale mean.
        wider: the lowest and the highest answer that is read from a file; None: those of the scale.
    """

    scale: tuple[int, int]
    points: int
    text: str
    lowest: str
    highest: str
    wider: tuple[int, int] | None = None

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest answer that is read from a file."""
        return self.wider or self.scale

    def accepts(self, answer: float) -> bool:
        """Whether an answer is within the limits; NaN is not."""
        low, high = self.limits
        return low <= answer <= high


def _rating(text: str, lowest: str, highest: str) -> Question:
    """Most of CANDOR's questions run from 1 to 9 or 1 to 7. Other corpora have 0 and 10 too, so these are read."""
    return Question((1, 9), 10, text, lowest, highest, wider=(0, 10))


# In this order they are the columns of a survey.csv that is written.
QUESTIONS = {
    "you_are_funny": _rating("How funny was your partner?", "not at all", "very"),
    "you_are_intelligent": _rating("How intelligent did your partner seem?", "not at all", "very"),
    "our_thoughts_synced_up_sr1": _rating("How well were you on the same wavelength?", "not at all", "completely"),
    "you_are_humble": _rating("How humble was your partner?", "not at all", "very"),
    "end_affect": _rating("How did you feel at the end of the conversation?", "very bad", "very good"),
    "overall_affect": _rating("How did you feel during the conversation, over all?", "very bad", "very good"),
    "overall_memory_rating": _rating("How good a memory will this conversation be?", "very bad", "very good"),
    "how_enjoyable": _rating("How much did you enjoy the conversation?", "not at all", "very much"),
    "i_like_you": _rating("How much did you like your partner?", "not at all", "very much"),
    "in_common": _rating("How much did you and your partner have in common?", "nothing", "very much"),
    "conversationalist": Question(
        (0, 100), 1, "How good is your partner at conversation, among all you know?", "the worst", "the best"
    ),
    "good_for_advice": Question(
        (0, 100), 1, "How good would your partner's advice be, among all you know?", "the worst", "the best"
    ),
    "you_are_quickwitted": _rating("How quick-witted was your partner?", "not at all", "very"),
    "you_are_competent": _rating("How competent did your partner seem?", "not at all", "very"),
    "you_are_kind": _rating("How kind was your partner?", "not at all", "very"),
    "you_are_friendly": _rating("How friendly was your partner?", "not at all", "very"),
    "you_are_warm": _rating("How warm was your partner?", "not at all", "very"),
}
