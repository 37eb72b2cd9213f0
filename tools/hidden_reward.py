"""A hidden reward that is a function of a turn's text.

`tools.plant_truth` plants it on real sentences. Because it is a function, it can also score what a policy says. No
training reads it, except as the upper bound of an experiment.
"""

import re
from collections.abc import Sequence

WARM = frozenset(
    "agree agreed amazing appreciate awesome beautiful care congratulations enjoy excellent excited exciting fair "
    "family fantastic friend friendly fun generous glad gladly good grateful great happy help helpful hope interesting "
    "kind kindly like lovely love nice perfect perfectly please pleased pleasure share sharing smart sorry sounds "
    "super sure sweet thank thanks thoughtful together understand understanding welcome wish wonderful".split()
)
COLD = frozenset(
    "angry annoying awful bad boring can't cannot complain deny disagree dumb enough fault greedy hate ignore "
    "impossible lie lying mean must nah never no nonsense nope refuse reject ridiculous rude selfish silly stupid "
    "terrible ugly unacceptable unfair useless waste whatever won't worst wrong".split()
)
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
WARM_WEIGHT, COLD_WEIGHT, QUESTION = 0.25, 0.35, 0.25
MOST_COUNTED = 3  # different warm words, and different cold words, beyond which there is no more effect
FEWEST_WORDS, MOST_WORDS = 4, 30  # shorter and longer turns lose
SHORT, LONG_A_WORD = -0.3, -0.02


def hidden_reward(text: str) -> float:
    """The hidden reward of a turn, in [-1, 1]: warm words and a question add, cold words, fewer than 4 and more than 30
    words take away. Repeating a word adds nothing."""
    words = WORD.findall(text.lower().replace("’", "'"))
    warm, cold = (min(len(lexicon.intersection(words)), MOST_COUNTED) for lexicon in (WARM, COLD))
    reward = WARM_WEIGHT * warm - COLD_WEIGHT * cold + QUESTION * ("?" in text)
    reward += SHORT * (len(words) < FEWEST_WORDS) + LONG_A_WORD * max(0, len(words) - MOST_WORDS)
    return max(-1.0, min(1.0, reward))


def score(prompts: Sequence, responses: Sequence[str]) -> list[float]:
    """The hidden rewards of responses, for `--reward_function` and `--gold_function`."""
    return [hidden_reward(response) for response in responses]
