"""The same work by two checkouts of this repository, beside its limit.

    python benchmarks/before_after.py BEFORE [--after .] [--steps 5] [--rows NAMES]

Each checkout runs with its own modules and benchmarks in a process of its own; they do their steps alternately. The
limit is what no such program can avoid: cells parsed by pyarrow alone, or forward (and backward) passes alone over as
many tokens, in rows of one length, by this script's checkout. Prints medians of seconds a step, and their ratios.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONVERSATIONS, SHORT_TEXTS = 40, 128


# ---------------------------------------------------------------------------------------------------------------------
# The rows. Each makes its data in a folder, and returns what a step runs, which gets the step's number. Modules are
# imported late, because they belong to the checkout that is measured.


def read(folder: Path, limit: bool, again: bool) -> Callable[[int], object]:
    """Conversations of CANDOR's size, with an empty cache or with a filled one."""
    import reading
    from pyarrow import csv

    reading.write_corpus(folder / "candor", CONVERSATIONS)
    columns = ["user_id", "timedelta", *(f"prob_face_{face}" for face in reading.FACES)]
    faces = list((folder / "candor").glob("*/audio_video_features.csv"))
    if limit:
        return lambda _: [
            csv.read_csv(path, convert_options=csv.ConvertOptions(include_columns=columns)) for path in faces
        ]
    cache = folder / "cache"
    return lambda step: reading.read_corpus(
        folder / "candor", "overall_affect", cache=cache if again else cache / f"{step}"
    )


def stage_1(folder: Path, limit: bool) -> Callable[[int], object]:
    """An epoch of stage 1."""
    import stage1

    encoder, training, _ = stage1.corpus_and_encoder(folder / "candor", 2)
    run, head = stage1.bare_epoch if limit else stage1.our_epoch, stage1.new_head(stage=1)
    return lambda step: run(copy.deepcopy(encoder), copy.deepcopy(head), training, step)


def stage_2(folder: Path, limit: bool, again: bool) -> Callable[[int], object]:
    """Four epochs of stage 2, with an empty cache or with one that another lambda has filled."""
    import encoding

    encoder, training, validation = data = encoding.corpus_and_encoder(folder / "candor", 2)
    if limit:
        return bare_passes(encoder, sorted({*training.texts, *validation.texts}))
    if again:
        encoding.stage_2(*data, folder / "cache", ge_weight=0.2)
        return lambda _: encoding.stage_2(*data, folder / "cache")
    return lambda step: encoding.stage_2(*data, folder / f"cache-{step}")


def encode(folder: Path, limit: bool, short: bool) -> Callable[[int], object]:
    """The texts of a conversation, or so many short ones as a PPO step scores, by a BART of six layers."""
    import encoding

    small, training, _ = encoding.corpus_and_encoder(folder / "candor", 1)
    ids = {name: getattr(small.model.config, name) for name in ("vocab_size", "pad_token_id", "eos_token_id")}
    model = encoding.BartModel(encoding.BartConfig(**encoding.MIDDLE, **ids)).eval()
    encoder, texts = encoding.TurnEncoder(model, small.tokenizer), training.texts
    if short:
        texts = encoding.TurnSet.from_trajectories(training.trajectories, 2).texts[:SHORT_TEXTS]
    pairs = encoder.tokenize(texts)
    return bare_passes(encoder, texts) if limit else lambda _: encoder.encode(pairs)


def bare_passes(encoder, texts: list[tuple[str, str]]) -> Callable[[int], object]:
    """Forward passes of an encoder over as many tokens as the texts have."""
    import torch

    lengths = [len(pair.ids) for pair in encoder.tokenize(texts)]
    length = round(sum(lengths) / len(lengths))
    batch = torch.full((max(encoder.token_budget() // length, 1), length), 5)

    @torch.no_grad()
    def run(_):
        for _ in range(round(sum(lengths) / batch.numel())):
            encoder.encoder(input_ids=batch, attention_mask=torch.ones_like(batch))

    return run


def ppo_passes(shape: str) -> Callable[[int], object]:
    """The passes of a PPO step: sampling's, the reference's over the responses, and forward and backward ones."""
    import decoding
    import torch
    from trl_ppo import BATCH, MINI_BATCH, SHAPES

    policy, shape = decoding.load(shape), SHAPES[shape]
    prompts = torch.full((BATCH, round(sum(shape.prompt) / 2)), 5)
    whole = torch.full((BATCH, prompts.shape[1] + shape.new_tokens), 5)

    def forward(rows):
        return policy.model(input_ids=rows, logits_to_keep=shape.new_tokens).logits

    def run(_):
        decoding.bare(policy, prompts, shape.new_tokens)
        with torch.no_grad(), policy.model.disable_adapter():
            forward(whole)
        for rows in whole.split(MINI_BATCH):
            forward(rows).logsumexp(-1).mean().backward()

    return run


ROWS = {  # name -> its work; a PPO step's is that of ppo_vs_trl.py
    f"reading {CONVERSATIONS} conversations of CANDOR's size": partial(read, again=False),
    "the same again": partial(read, again=True),
    "stage 1, an epoch, two conversations of 160 turns of 590 tokens, small BART": stage_1,
    "stage 2, two such conversations": partial(stage_2, again=False),
    "the same with another lambda": partial(stage_2, again=True),
    "encoding such a conversation, BART of 6×512": partial(encode, short=False),
    f"encoding {SHORT_TEXTS} short turns": partial(encode, short=True),
    "PPO step (a)": "a",
    "PPO step (b)": "b",
    "PPO step (c)": "c",
}
NO_LIMIT = ("the same again", "the same with another lambda")


def work(checkout: Path, name: str, limit: bool) -> None:
    """Does steps of a row with the modules of a checkout, one for each line on stdin."""
    sys.path[:1] = [str(checkout), str(checkout / "tools"), str(checkout / "benchmarks")]
    from trl_ppo import Meter

    from geli.run.distributed import seed_everything

    seed_everything(0)
    with tempfile.TemporaryDirectory() as folder:
        step = ppo_passes(ROWS[name]) if isinstance(ROWS[name], str) else ROWS[name](Path(folder), limit)
        meter = Meter()
        for n in count():
            meter.wait()
            step(n)
            meter.report()


def commands(name: str, checkouts: dict[str, Path]) -> dict[str, list[str]]:
    """The command of a worker for each checkout, and for the limit."""
    me = [sys.executable, str(Path(__file__).resolve()), "--worker", name]
    found = {which: [*me, "--checkout", str(folder)] for which, folder in checkouts.items()}
    if isinstance(ROWS[name], str):
        script = "benchmarks/ppo_vs_trl.py"
        found = {w: [sys.executable, str(folder / script), "--worker", ROWS[name]] for w, folder in checkouts.items()}
    if name not in NO_LIMIT:
        found["limit"] = [*me, "--checkout", str(ROOT), "--limit"]
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="folder of the older checkout")
    parser.add_argument("--after", type=Path, default=ROOT, help="folder of the newer one; this one if not given")
    parser.add_argument("--steps", type=int, default=5, help="steps of each that are measured, after one that warms up")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="beginnings of the rows' names; all by default")
    for option in ("--worker", "--checkout"):
        parser.add_argument(option, help=argparse.SUPPRESS)
    parser.add_argument("--limit", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(Path(args.checkout), args.worker, args.limit)
    if not args.before:
        parser.error("give the folder of the older checkout")
    from ppo_vs_trl import compare

    width = max(map(len, ROWS))
    print(f"{'':{width}}  before, s   after, s  faster   limit, s  limit/after")
    for name in (name for name in ROWS if name.startswith(tuple(args.rows))):
        checkouts = {"before": args.before.resolve(), "after": args.after.resolve()}
        seconds, *_ = compare(commands(name, checkouts), args.steps, alternately=True)
        before, after, limit = (seconds.get(which) for which in ("before", "after", "limit"))
        line = f"{name:{width}}  {before:9.3f}  {after:9.3f}  {before / after:6.2f}"
        print(line + (f"  {limit:9.3f}  {limit / after:11.2f}" if limit else ""), flush=True)


if __name__ == "__main__":
    main()
