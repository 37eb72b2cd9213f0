"""Serves a trained reward over HTTP, for OpenRLHF and any other program.

    python -m apps.serve --reward_path RUN
    python -m apps.serve --reward_path RUN --host 0.0.0.0 --port 5000 --token_file token

POST /get_reward speaks OpenRLHF's remote reward protocol, POST /score gives turn rewards of conversations; GET /health
and GET /metrics tell how it does. README.md in this folder has the details.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from apps.options import add_head_options
from geli.run.errors import run
from geli.run.options import new_parser, non_negative_int, positive_int


def parse_options(argv: Sequence[str] | None = None):
    """The options on the command line."""
    parser = new_parser("Serve a trained reward over HTTP.")
    parser.add_argument(
        "--reward_path", metavar="HEAD", required=True, help="run name, path of a reward1_ file, or its folder "
        "(no default)",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than this need a token")
    parser.add_argument("--port", type=non_negative_int, default=5000, help="port to listen on; 0 is a free one")
    parser.add_argument(
        "--token_file", type=Path, help="file with the token that requests must bring (default: none is needed)"
    )
    parser.add_argument(
        "--max_waiting", type=positive_int, default=16_384, help="texts that may wait; above it, the answer is 503"
    )
    parser.add_argument(
        "--max_together", type=positive_int, default=256, help="texts of several requests that are scored together"
    )
    parser.add_argument(
        "--context_turns", type=positive_int, help="turns of chat messages that are read (default: as in training)"
    )
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="hub id or folder of the policy's tokenizer, whose chat template wrote "
        "the prompts (default: templates in wide use are recognised)",
    )  # fmt: skip
    add_head_options(parser)
    return parser.parse_args(argv)


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else None

from transformers import AutoTokenizer

from apps.packages import install, require
from apps.serve.template import TokenizerTemplate
from geli.nets.pretrained import load_pretrained
from geli.reward import GELIReward


def main(options) -> None:
    """Loads the reward, and serves it until a signal comes."""
    serving = require("apps.serve.server", "serving a reward", install("serve"))
    token = serving.read_token(options.token_file) if options.token_file else None
    reward = GELIReward.load(
        options.reward_path, output_dir=options.output_dir, device=options.device, dtype=options.dtype,
        context_turns=options.context_turns, lang_model_path=options.lang_model_path,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    if options.tokenizer:
        found = load_pretrained(AutoTokenizer, options.tokenizer, "--tokenizer", options.trust_remote_code)
        reward.template = TokenizerTemplate(found)
    limits = serving.Limits(waiting=options.max_waiting, together=options.max_together)
    server = serving.RewardServer(reward, options.host, options.port, limits, token)
    print(f"Rewards of {reward.path} on {server.url}: POST /get_reward, POST /score, GET /health, GET /metrics")
    print("Ctrl-C stops it, after the requests that it has.", flush=True)
    server.run()


if __name__ == "__main__":
    run(partial(main, OPTIONS))
