"""Stage 2's cost, and the encoding loop against its limit.

    python benchmarks/encoding.py [--conversations 2]

Work: conversations of 160 turns (80 agent turns a flip) at about 590 real tokens a turn, 4 epochs, both flips, RRD with
K = 160. Peer: the procedure as published (`as_published.py`): every epoch and flip 160 draws with replacement, each
padded to 1,024 tokens, through encoder and decoder. Prints
1. FLOPs of a bart-large shape, counted by torch on those lengths, and their ratio;
2. seconds of a whole stage 2 on a small BART here: published; ours with an empty cache; ours again with another lambda
   and with another decomposition; and the validation L_GE of each;
3. on a middle-sized BART: tokens/s of our encoding loop over those of bare encoder forwards on full, unpadded batches
   of the same shape;
4. how far features depend on the batch that they are computed in.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import as_published
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BartConfig, BartModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from sample_candor import write_corpus
from tiny_models import FORMS, train_tokenizer

from data_utils import TurnSet, read_corpus, split
from geli.nets.encoder import TurnEncoder
from geli.nets.features import TurnFeatures
from geli.report import evaluate
from geli.run.console import format_table
from geli.run.distributed import make_accelerator, seed_everything
from geli.run.training import train_steps
from models import RewardHead, RewardHeadConfig, head_rewards, predicted_returns
from train_reward_GELI import GELITraining, GELITrainingOptions

EPOCHS, L, TURNS, REAL_TOKENS, LEARNING_RATE = 4, 160, 160, 590, 5e-3
LARGE = dict(d_model=1024, encoder_layers=12, decoder_layers=12, encoder_attention_heads=16, decoder_attention_heads=16,
             encoder_ffn_dim=4096, decoder_ffn_dim=4096, vocab_size=50265, max_position_embeddings=1024)  # fmt: skip
SMALL = dict(d_model=128, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
             encoder_ffn_dim=512, decoder_ffn_dim=512, max_position_embeddings=1024, dropout=0.0)  # fmt: skip
MIDDLE = {**SMALL, "d_model": 512, "encoder_layers": 6, "decoder_layers": 1, "encoder_attention_heads": 8,
          "encoder_ffn_dim": 2048}  # fmt: skip


def corpus_and_encoder(folder: Path, conversations: int):
    """Training and validation turns of about 590 tokens, and a small BART that can read them."""
    write_corpus(folder, conversations=conversations + 1, n_turns=TURNS, seed=0)
    corpus = read_corpus(folder, "overall_affect")
    parts = split(corpus, conversations)
    words = [(c, r) for part in parts for c, r in TurnSet.from_trajectories(part, 4).texts]
    tokenizer = train_tokenizer(words, 2000, FORMS["bart"])
    tokenizer.model_max_length = 1024
    ids = dict(vocab_size=len(tokenizer), pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2)
    encoder = TurnEncoder(BartModel(BartConfig(**SMALL, **ids)).eval(), tokenizer)
    low, high = 1, TURNS  # the context that makes a turn 590 tokens long on average
    while low < high:
        middle = (low + high) // 2
        lengths = [len(pair.ids) for pair in encoder.tokenize(TurnSet.from_trajectories(parts[0], middle).texts)]
        low, high = (middle + 1, high) if np.mean(lengths) < REAL_TOKENS else (low, middle)
    return encoder, *(TurnSet.from_trajectories(part, low) for part in parts)


def flops(config: dict, length: int, decoder: bool) -> float:
    """Of one turn of `length` tokens through a BART's encoder, and decoder, counted on the meta device."""
    with torch.device("meta"):
        model = BartModel(BartConfig(**config, attn_implementation="eager"))
        ids = torch.ones(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids) if decoder else model.get_encoder()(input_ids=ids)
    return counter.get_total_flops()


def count_flops(lengths: np.ndarray) -> list[dict]:
    """A conversation's and all epochs' FLOPs on a bart-large shape, as published and ours."""
    padded = as_published.PADDED_TOKENS
    draws = EPOCHS * 2 * as_published.K
    points = sorted({int(n) for n in np.quantile(lengths, np.linspace(0, 1, 7))})
    each = np.interp(lengths, points, [flops(LARGE, n, decoder=False) for n in points]).mean() * TURNS
    published = {
        "encoder": draws * flops(LARGE, padded, decoder=False),
        "both": draws * flops(LARGE, padded, decoder=True),
    }
    rows = [
        {"procedure": "as published, encoder and decoder", "FLOP": published["both"], "ratio": published["both"] / each}
    ]
    rows.append(
        {"procedure": "as published, encoder alone", "FLOP": published["encoder"], "ratio": published["encoder"] / each}
    )
    return [*rows, {"procedure": f"ours, {TURNS} distinct turns once", "FLOP": each, "ratio": 1.0}]


def new_head(kind: str) -> RewardHead:
    """A fresh head, as stage 2 makes it."""
    head = "rudder" if kind == "RUDDER" else "small_model_shrink"
    return RewardHead(RewardHeadConfig(head, SMALL["d_model"], None, False, 1024, 20, 2, "overall_affect", kind))


def published_stage_2(encoder, training, validation) -> float:
    """Every draw padded and encoded when it is needed, and so are the validation turns in every epoch."""

    def validate(head) -> float:
        rewards = head_rewards(head, as_published.encode(encoder, validation.texts), validation)
        return evaluate(validation, rewards, predicted_returns(validation, rewards, L, "RRD"))["ge_loss"]

    seed_everything(0)
    return as_published.train_stage_2(encoder, new_head("RRD"), training, EPOCHS, L, LEARNING_RATE, validate)


def our_stage_2(encoder, training, validation, cache: Path, kind="RRD", weight=0.5) -> float:
    """The training loop of stage 2: every distinct turn encoded once, or read from the cache."""
    seed_everything(0)
    options = GELITrainingOptions(
        redist_type=kind, ge_weight=weight, epochs=EPOCHS, learning_rate=LEARNING_RATE, K=as_published.K, ep_len=L
    )
    accelerator = make_accelerator("cpu", "float32")
    features = TurnFeatures(encoder, accelerator, cache)
    stage = GELITraining(
        new_head(kind), features, training, validation, options, accelerator, seed=0, save=lambda: None
    )
    train_steps(stage, stage.steps, "")
    return stage.best["best_ge_loss"]


def stage_2_seconds(encoder, training, validation, folder: Path) -> list[dict]:
    """Wall-clock and validation L_GE of whole stage-2 runs."""
    runs = {
        "as published": lambda: published_stage_2(encoder, training, validation),
        "ours, empty cache": lambda: our_stage_2(encoder, training, validation, folder),
        "ours again, lambda 0.2": lambda: our_stage_2(encoder, training, validation, folder, weight=0.2),
        "ours again, IRCR": lambda: our_stage_2(encoder, training, validation, folder, "IRCR"),
        "ours again, RUDDER": lambda: our_stage_2(encoder, training, validation, folder, "RUDDER"),
    }
    rows = []
    for name, run in runs.items():
        start = time.perf_counter()
        loss = run()
        seconds = time.perf_counter() - start
        rows.append({"stage 2": name, "seconds": seconds, "validation L_GE": loss})
    for row in rows:
        row["times faster"] = rows[0]["seconds"] / row["seconds"]
    return rows


def throughput(encoder, turns: TurnSet, repeats: int = 2) -> float:
    """Tokens/s of the real loop (tokenised texts in, features out) over those of bare forwards on full batches.

    The bare batches hold the same numbers of real tokens in as many rows, all of one length: no padding, no collation.
    """
    pairs = encoder.tokenize(turns.texts)
    lengths = np.array([len(pair.ids) for pair in pairs])
    tokens, length = int(lengths.sum()), round(lengths.mean())  # shapes alike, so attention costs alike
    rows = encoder.token_budget() // length
    batch = torch.full((rows, length), 5)
    mask = torch.ones_like(batch)
    loop, bare = [], []
    with torch.no_grad():
        for _ in range(repeats + 1):  # the first is for warming up
            start = time.perf_counter()
            encoder.encode(pairs)
            loop.append(tokens / (time.perf_counter() - start))
            start = time.perf_counter()
            for _ in range(max(1, round(tokens / batch.numel()))):
                encoder.encoder(input_ids=batch, attention_mask=mask)
            bare.append(max(1, round(tokens / batch.numel())) * batch.numel() / (time.perf_counter() - start))
    print(f"loop {np.median(loop[1:]):,.0f} tokens/s, bare {np.median(bare[1:]):,.0f} tokens/s")
    return float(np.median(loop[1:]) / np.median(bare[1:]))


def batch_dependence(encoder, turns: TurnSet) -> list[dict]:
    """Largest difference of a feature between batches of one and full batches, beside the features' spread."""
    pairs, rows = encoder.tokenize(turns.texts[::4]), []
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):

        def autocast(dtype=dtype):
            return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)

        full = encoder.encode(pairs, autocast)
        encoder.tokens_per_batch = 1
        alone = encoder.encode(pairs, autocast)
        encoder.tokens_per_batch = None
        difference = (full - alone).abs().max().item()
        rows.append(
            {"numerics": name, "largest difference": difference, "features' standard deviation": full.std().item()}
        )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=2, help="training conversations; one more validates")
    args = parser.parse_args()
    seed_everything(0)
    with tempfile.TemporaryDirectory() as temporary:
        encoder, training, validation = corpus_and_encoder(Path(temporary) / "candor", args.conversations)
        lengths = np.array([len(pair.ids) for pair in encoder.tokenize(training.texts)])
        print(f"{args.conversations} conversations of {TURNS} turns, {lengths.mean():.0f} tokens a turn "
              f"({lengths.min()} to {lengths.max()})")  # fmt: skip
        print(format_table(count_flops(lengths), "\n1. bart-large's FLOPs, one conversation, 4 epochs, both flips"))
        rows = stage_2_seconds(encoder, training, validation, Path(temporary) / "cache")
        print(format_table(rows, "\n2. Seconds on a small BART"), flush=True)
    print("\n3. Encoding against its limit")
    ids = {name: getattr(encoder.model.config, name) for name in ("vocab_size", "pad_token_id", "eos_token_id")}
    middle = TurnEncoder(BartModel(BartConfig(**MIDDLE, **ids)).eval(), encoder.tokenizer)
    print(f"share of the limit: {throughput(middle, training):.2f}")
    print(format_table(batch_dependence(encoder, training), "\n4. Dependence on the batch"))


if __name__ == "__main__":
    main()
