"""Trains a small BART and a small Llama from scratch on a corpus' training conversations, with their tokenizers.

    python tools/tiny_models.py DATA_DIR OUT [--only bart|llama|policy]

They stand in for the published models where there is no network or no GPU: `OUT/bart` for `--lang_model_path`,
`OUT/llama` for `--model_name`. `OUT/policy` is a larger Llama (2.3 million weights on CaSiNo, some ten minutes) for
experiments of many seeds. They never see the validation conversations.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

from geli.run.errors import UserError, run
from geli.run.options import new_parser, positive_int, seed

BUILT = ("bart", "llama")  # unless told otherwise


def parse_options(argv: Sequence[str] | None = None):
    """The command line."""
    parser = new_parser("Train a small BART and a small Llama from scratch on a corpus' training conversations.")
    parser.add_argument("data_dir", help="corpus in CANDOR's layout, or rated chats")
    parser.add_argument("out", help="folder to write bart/, llama/ or policy/ to")
    parser.add_argument("--only", choices=(*BUILT, "policy"), help="train one of them (default: bart and llama)")
    parser.add_argument("--steps", type=positive_int, help="training steps of each (default: 400; of policy 600)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of every random choice")
    parser.add_argument(
        "--rating_range", type=float, nargs=2, metavar=("LO", "HI"), help="of rated chats (default: as the file states)"
    )
    return parser.parse_args(argv)


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else None

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BartConfig, BartModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data_utils import read_corpus, split, turn_text
from geli.data.chats import Range
from geli.nets.batching import shuffled_batches
from geli.nets.encoder import TurnEncoder
from geli.nets.pretrained import quiet_transformers
from geli.nets.prompts import prompt_text
from geli.run.console import progress_bar
from geli.run.distributed import seed_everything
from geli.run.files import atomic_folder

MAX_TOKENS = 512
FORMS = {  # of one text, and of a pair
    "bart": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "llama": ("<s> $A", "<s> $A <s> $B"),
}
BART_PIECES = 2000  # of its vocabulary, at most: a small corpus has fewer


class Recipe(NamedTuple):
    """How a Llama is made: pieces of its vocabulary at most, turns of context at most, its shape, and its training."""

    pieces: int
    context_turns: int
    hidden: int
    inner: int
    layers: int
    batch: int
    learning_rate: float
    weight_decay: float
    steps: int


LLAMAS = {
    "llama": Recipe(4000, 10, 128, 384, 3, 16, 2e-3, 0.01, 400),
    "policy": Recipe(3000, 2, 192, 512, 4, 32, 3e-3, 0.1, 600),
}


def build(
    data_dir: Path, out: Path, which: tuple[str, ...], seed: int, steps: int | None = None,
    rating_range: Range | None = None,
) -> None:  # fmt: skip
    """Reads `data_dir` and writes `out/NAME` of each model, trained for `steps` steps (None: what suits it)."""
    quiet_transformers()
    corpus = read_corpus(data_dir, "overall_affect", rating_range=rating_range)
    training, _ = split(corpus, len(corpus.conversations))
    if not training:
        raise UserError(f"{data_dir}: expected at least 2 conversations, to train on one and keep one for validation")
    for name in which:
        seed_everything(seed)
        if name == "bart":
            loss = _train_bart(training, out / name, seed, steps or 400)
        else:
            loss = _train_llama(training, out / name, seed, LLAMAS[name], steps or LLAMAS[name].steps)
        print(f"Wrote {out / name} (loss of its last 20 steps: {loss:.2f} nats a token)")


def _train_bart(training, folder: Path, seed: int, steps: int) -> float:
    """A BART whose encoder learns to tell, from the representation of a turn alone, which words its response holds and
    which the turn before it held: what stages 1 and 2 read is then worth reading. The decoder stays untrained."""
    rng = np.random.default_rng(seed)
    texts = [turn_text(t.conversation, i, t.user, int(rng.integers(1, 5))) for t in training for i in t.agent_turns]
    tokenizer = train_tokenizer(texts, BART_PIECES, FORMS["bart"])
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=128, encoder_layers=2, decoder_layers=1, encoder_ffn_dim=256,
        decoder_ffn_dim=256, encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.eos_token_id, forced_eos_token_id=tokenizer.eos_token_id, dropout=0.0,
    )  # fmt: skip
    model = BartModel(config)
    encoder = TurnEncoder(model, tokenizer, MAX_TOKENS)
    heads = torch.nn.ModuleList([torch.nn.Linear(config.d_model, config.vocab_size) for _ in range(2)])
    pairs = encoder.tokenize(texts)
    words = [
        tokenizer(list(column), add_special_tokens=False)["input_ids"]
        for column in ([response for _, response in texts], [context.rsplit("  ", 1)[-1] for context, _ in texts])
    ]

    def batch_loss():
        chosen = rng.integers(len(pairs), size=48)
        turns = encoder(**encoder.collate([pairs[i] for i in chosen]))
        losses = []
        for head, bags in zip(heads, words, strict=True):
            rows = np.repeat(np.arange(len(chosen)), [len(bags[i]) for i in chosen])
            tokens = torch.tensor([token for i in chosen for token in bags[i]])
            losses.append(torch.nn.functional.cross_entropy(head(turns)[rows], tokens))
        return losses[0] + 0.3 * losses[1]

    return _fit(model, tokenizer, batch_loss, folder, steps, 1e-3, heads)


def _train_llama(training, folder: Path, seed: int, recipe: Recipe, steps: int) -> float:
    """A Llama on stage 3's own prompts and the human answers to them."""
    rng = np.random.default_rng(seed)
    places = [(t, i) for t in training for i in t.agent_turns]

    def document(place) -> str:
        trajectory, index = places[place]
        context, response = turn_text(
            trajectory.conversation, index, trajectory.user, int(rng.integers(0, recipe.context_turns + 1))
        )
        return prompt_text(context) + response.removeprefix("AI:") + "</s>"

    tokenizer = train_tokenizer([document(i) for i in range(len(places))], recipe.pieces, FORMS["llama"])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=recipe.hidden, intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)

    def batches() -> Iterator[list[str]]:
        """Documents of similar lengths, so that little of a batch is padding; anew in every epoch."""
        while True:
            texts = [document(i) for i in range(len(places))]
            lengths = np.array([len(ids) for ids in tokenizer(texts).input_ids])
            yield from ([texts[i] for i in batch] for batch in shuffled_batches(lengths, recipe.batch, rng))

    documents = batches()

    def batch_loss():
        inputs = tokenizer(next(documents), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
        return model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, labels=labels).loss

    return _fit(model, tokenizer, batch_loss, folder, steps, recipe.learning_rate, weight_decay=recipe.weight_decay)


def train_tokenizer(texts, vocabulary: int, forms: tuple[str, str]):
    """A byte-level BPE trained on `texts` (strings or pairs), which puts one text or a pair into `forms`."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    flat = (part for text in texts for part in ([text] if isinstance(text, str) else text))
    tokenizer.train_from_iterator(flat, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(*forms, [("<s>", 0), ("</s>", 2)])
    names = dict(bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    if forms == FORMS["bart"]:
        names |= dict(cls_token="<s>", sep_token="</s>", mask_token="<mask>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )


def _fit(model, tokenizer, batch_loss, folder: Path, steps: int, learning_rate: float, heads=None, weight_decay=0.01):
    """AdamW with warm-up and linear decay; writes the model (not the heads that only its training needs) and returns
    the mean loss of the last 20 steps."""
    parameters = [*model.parameters(), *(heads.parameters() if heads else ())]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))
    )
    model.train()
    losses = []
    for _ in progress_bar(range(steps), desc=f"training {folder.name}", unit="step"):
        loss = batch_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with atomic_folder(folder) as temporary:
        model.eval().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return sum(losses[-20:]) / len(losses[-20:])


def main(options) -> None:
    """Trains the models that the options name."""
    which = (options.only,) if options.only else BUILT
    build(Path(options.data_dir), Path(options.out), which, options.seed, options.steps, options.rating_range)


if __name__ == "__main__":
    run(partial(main, OPTIONS))
