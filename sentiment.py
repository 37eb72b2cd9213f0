"""The sentiment of utterances for `--li_signal sentiment`, the paper's language baseline in place of the face."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from cli import UserError

CLASSIFIER_BATCH = 64  # utterances


def lexicon_sentiment(texts: Sequence[str]) -> np.ndarray:
    """(n,) polarity of each text in [-1, 1] by TextBlob's lexicon; 0 where it knows no word."""
    from textblob import TextBlob

    return np.array([TextBlob(text).sentiment.polarity for text in texts], dtype=np.float64)


@lru_cache(maxsize=1)
def _classifier(name: str, trust_remote_code: bool):
    """Tokenizer, classifier and the sign of each of its labels."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from models import load_pretrained

    where = (name, "--sentiment_model", trust_remote_code)
    tokenizer, config = load_pretrained(AutoTokenizer, *where), load_pretrained(AutoConfig, *where)
    model = load_pretrained(AutoModelForSequenceClassification, *where, config=config).eval()
    labels = {i: str(label).lower() for i, label in model.config.id2label.items()}
    signs = torch.tensor([label.startswith("pos") - label.startswith("neg") for _, label in sorted(labels.items())])
    if not {-1, 1} <= set(signs.tolist()):
        raise UserError(
            f"--sentiment_model {name}: expected labels that begin with pos and neg, found {', '.join(labels.values())}"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model, signs


def classifier_sentiment(name: str, texts: Sequence[str], trust_remote_code: bool = False) -> np.ndarray:
    """(n,) P(positive) - P(negative) of each text, in [-1, 1], by a text classifier.

    Args:
        name: hub id or folder of a sequence classifier with labels that begin with `pos` and `neg` (others, such as
            `neutral`, count as 0). trust_remote_code: run code that it brings along.

    Raises:
        UserError: if it cannot be loaded, or its labels say nothing of the kind.
    """
    import torch

    from models import own_limit
    from runs import progress_bar

    tokenizer, model, signs = _classifier(name, trust_remote_code)
    limit = min(own_limit(model.config, tokenizer), 512)
    found = []
    with torch.inference_mode():
        for start in progress_bar(range(0, len(texts), CLASSIFIER_BATCH), desc="sentiment", unit="batch"):
            part = list(texts[start : start + CLASSIFIER_BATCH])
            inputs = tokenizer(part, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            found.append((model(**inputs).logits.float().softmax(dim=1) * signs).sum(dim=1))
    return torch.cat(found).double().numpy() if found else np.zeros(0)
