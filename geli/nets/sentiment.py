"""The sentiment of utterances, for `--li_signal sentiment`."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from textblob import TextBlob
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from geli.nets.encoder import own_limit
from geli.nets.pretrained import load_pretrained
from geli.run.console import progress_bar
from geli.run.errors import UserError

CLASSIFIER_BATCH = 64  # utterances
CLASSIFIER_TOKENS = 512  # at most; longer utterances are cut


def lexicon_sentiment(texts: Sequence[str]) -> np.ndarray:
    """(n,) polarity of each text in [-1, 1] by TextBlob's lexicon; 0 for a text without a word in the lexicon."""
    return np.array([TextBlob(text).sentiment.polarity for text in texts], dtype=np.float64)


@lru_cache(maxsize=1)
def _classifier(name: str, trust_remote_code: bool):
    """A text-classification pipeline, its limit of tokens, and the sign of each of its labels."""
    source = (name, "--sentiment_model", trust_remote_code)
    tokenizer, config = load_pretrained(AutoTokenizer, *source), load_pretrained(AutoConfig, *source)
    model = load_pretrained(AutoModelForSequenceClassification, *source, config=config)
    labels = [str(label) for label in model.config.id2label.values()]
    signs = {label: label.lower().startswith("pos") - label.lower().startswith("neg") for label in labels}
    if not {-1, 1} <= set(signs.values()):
        raise UserError(
            f"--sentiment_model {name}: expected labels that begin with pos and neg, found {', '.join(labels).lower()}"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    # the function is given because config.json could name another one
    classify = pipeline(
        "text-classification", model=model, tokenizer=tokenizer, device="cpu", top_k=None, function_to_apply="softmax"
    )
    return classify, min(own_limit(model.config, tokenizer), CLASSIFIER_TOKENS), signs


def classifier_sentiment(name: str, texts: Sequence[str], trust_remote_code: bool = False) -> np.ndarray:
    """(n,) P(positive) - P(negative) of each text, in [-1, 1], by a text classifier.

    Args:
        name: hub id or folder of a sequence classifier with labels that begin with `pos` and `neg`; other labels, such
            as `neutral`, count as 0. trust_remote_code: run code that the model brings along.

    Raises:
        UserError: if it cannot be loaded, or has no such labels.
    """
    classify, limit, signs = _classifier(name, trust_remote_code)
    result = []
    for start in progress_bar(range(0, len(texts), CLASSIFIER_BATCH), desc="sentiment", unit="batch"):
        part = list(texts[start : start + CLASSIFIER_BATCH])
        for scores in classify(part, batch_size=len(part), truncation=True, max_length=limit):
            result.append(sum(signs[row["label"]] * row["score"] for row in scores))
    return np.array(result, dtype=np.float64)
