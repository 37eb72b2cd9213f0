"""Lets a language model share each score out over the turns, for `train_reward_GELI.py --redist_type LLM`.

    python -m apps.llm_shares DATA_DIR OUT --folder MODEL
    python -m apps.llm_shares DATA_DIR OUT --url http://localhost:8000/v1 --model NAME --log_text

Writes `OUT/shares.csv`, a row a turn. Run it again to continue where it stopped: no request is repeated.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from apps.options import server_url
from geli.data.candor import TRANSCRIPTS
from geli.data.questions import QUESTIONS
from geli.run.errors import run
from geli.run.options import (
    new_parser,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    seed,
)


def parse_options(argv: Sequence[str] | None = None):
    """The options on the command line."""
    parser = new_parser("Let a language model share each score out over the turns of its conversation.")
    parser.add_argument(
        "data_dir", help="folder with one folder a conversation, in CANDOR's layout; or rated chats (JSONL)"
    )
    parser.add_argument("out", type=Path, help="folder of the shares and of the model's replies")
    parser.add_argument("--url", type=server_url, help="an OpenAI-compatible server, as http://localhost:8000/v1")
    parser.add_argument("--model", help="the model's name on the server")
    parser.add_argument("--folder", help="or: folder or hub id of a model that runs here; its decoding is constrained")
    parser.add_argument(
        "--reward_class", default="overall_affect", choices=QUESTIONS, metavar="CLASS", help="the score"
    )
    parser.add_argument("--transcript", default="cliffhanger", choices=TRANSCRIPTS, help="which transcript is read")
    parser.add_argument(
        "--rating_range", nargs=2, type=float, metavar=("LO", "HI"), help="of rated chats (default: as the file states)"
    )
    parser.add_argument("--train_size", type=positive_int, default=500, help="training conversations, as in stage 2")
    parser.add_argument("--li_text", action="store_true", help="tell the model in words how the listener looks")
    parser.add_argument("--window", type=positive_int, default=40, help="agent turns in a request")
    parser.add_argument("--overlap", type=non_negative_int, default=8, help="agent turns that two requests share")
    parser.add_argument("--tries", type=positive_int, default=2, help="requests about the same turns at most")
    parser.add_argument("--max_tokens", type=positive_int, default=1024, help="of a server's reply")
    parser.add_argument(
        "--schema",
        choices=("json_schema", "json_object"),
        help="make the server reply in JSON with one number for each turn: json_schema for OpenAI's servers and vLLM, "
        "json_object for llama.cpp (default: free text)",
    )
    parser.add_argument("--timeout", type=positive_float, default=120.0, help="seconds that the server may be silent")
    parser.add_argument("--concurrency", type=positive_int, default=4, help="requests to the server at a time")
    parser.add_argument(
        "--price",
        type=non_negative_float,
        nargs=2,
        metavar=("IN", "OUT"),
        help="dollars for a million tokens, for the estimate",
    )
    parser.add_argument("--estimate", action="store_true", help="say what it takes, and ask nothing")
    parser.add_argument("--log_text", action="store_true", help="let conversations be sent to the server")
    parser.add_argument("--seed", type=seed, default=0, help="of the server's sampling")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="auto is a GPU if there is one"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto is bfloat16 on a GPU that has it"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that a model brings along")
    options = parser.parse_args(argv)
    if bool(options.url) == bool(options.folder):
        parser.error("who is asked? give --url and --model of a server, or --folder of a model that runs here")
    if bool(options.url) != bool(options.model):
        parser.error("--url and --model go together")
    if options.overlap >= options.window:
        parser.error(f"--overlap {options.overlap}: fewer turns than those of --window ({options.window}) are expected")
    if options.url and not (options.log_text or options.estimate):
        parser.error(f"conversations would be sent to {options.url}: give --log_text if they may")
    return options


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else None

from apps.llm_shares.backends import BACKENDS, BackendOptions
from apps.llm_shares.shares import ShareOptions, share_out
from data_utils import read_corpus, split
from geli.run.console import format_table


def main(options) -> None:
    """Asks about the training conversations, and prints what came of it."""
    corpus = read_corpus(
        options.data_dir, options.reward_class, options.transcript, needs_faces=options.li_text,
        rating_range=options.rating_range,
    )  # fmt: skip
    print(corpus.describe())
    training, _ = split(corpus, options.train_size)
    backend = BACKENDS["url" if options.url else "folder"].make(
        BackendOptions(
            options.url, options.model, options.folder, options.seed, options.max_tokens, options.schema,
            options.timeout, options.concurrency, options.device, options.dtype, options.trust_remote_code,
        )
    )  # fmt: skip
    asked = ShareOptions(options.reward_class, options.window, options.overlap, options.li_text, options.tries)
    results = share_out(
        training, backend, options.out, asked, price=options.price, only_estimate=options.estimate,
        arguments=vars(options),
    )  # fmt: skip
    if results:
        print(format_table(results, f"\n{len(training):,} trajectories"))
        print("\n".join(["Written:", *(f"  {options.out / name}" for name in ("shares.csv", "shares.json"))]))


if __name__ == "__main__":
    run(partial(main, OPTIONS))
