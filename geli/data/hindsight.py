"""Hindsight: what the user's next turn says about the score, as far as words can tell (docs/method.md)."""

from collections.abc import Sequence

import numpy as np

FOLDS = 5  # parts of the training conversations, each of which is left out of one model
PENALTIES = 10.0 ** np.arange(-1, 4)  # of the ridge regression; the error of left-out scores chooses
WORDS = {"token_pattern": r"\w+|[^\w\s]", "ngram_range": (1, 2), "max_features": 5000}  # words, marks, emoji, and pairs
Heard = tuple[str, float, list[str]]  # conversation, R in points, what the user says next after each agent turn, if any


def hindsight(heard: Sequence[Heard], training: Sequence[Heard]) -> np.ndarray:
    """(2, N) h_t of all N turns of the trajectories in `heard`, in points, and its rank in [0, 1] among the answers
    that the model was fitted on (the share with a lower h, and half of those with the same); NaN without an answer.

    Conversations of `training` are scored by the model that their fold, with both trajectories of a conversation, was
    left out of: no target knows the score of its own conversation. Others are scored by a model of all. If users answer
    in fewer than `FOLDS` training conversations, prints that, and all is NaN.
    """
    training = [one for one in training if any(one[2])]
    fold = {name: place % FOLDS for place, name in enumerate(sorted({name for name, *_ in training}))}
    answers = np.array([answer for *_, said in heard for answer in said], dtype=object)
    parts = np.array([fold.get(name, FOLDS) for name, _, said in heard for _ in said], dtype=int)
    found = np.full((2, len(answers)), np.nan)
    if len(fold) < FOLDS:
        print(f"hindsight: needs {FOLDS} training conversations in which users answer, found {len(fold)}: no targets")
        return found
    for part in np.unique(parts[answers != ""]):
        chosen = (parts == part) & (answers != "")
        found[:, chosen] = _score(answers[chosen], [one for one in training if fold[one[0]] != part])
    return found


def _score(answers: Sequence[str], training: Sequence[Heard]) -> np.ndarray:
    """(2, k) points and ranks of answers (k,) by a model of `training`."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # loads slowly
    from sklearn.linear_model import RidgeCV

    words = TfidfVectorizer(**WORDS)
    features = words.fit_transform("\n".join(said) for *_, said in training)
    model = RidgeCV(PENALTIES).fit(features, [score for _, score, _ in training])
    points = model.predict(words.transform(answers))
    known = np.sort(model.predict(words.transform(answer for *_, said in training for answer in said if answer)))
    below, up_to = (np.searchsorted(known, points, side) for side in ("left", "right"))
    return np.array([points, (below + up_to) / (2 * len(known))])
