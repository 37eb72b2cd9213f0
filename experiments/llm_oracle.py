"""Does the path from a language model's shares to a reward head work? An oracle that knows the truth is asked instead.

    python experiments/llm_oracle.py OUT --data_dir PLANTED --encoder FOLDER [--noise 1] [--faults 0.2] [--seeds 3]

PLANTED is a corpus that tools/plant_truth.py wrote. The oracle is an OpenAI-compatible server on this machine. It gives
a turn 5 + 5 * (hidden reward) points of 10, with normal noise, and spoils a share of its replies in the ways in which
models do. apps/llm_shares asks it about all training conversations. Then heads are trained on its shares, by RRD
and by IRCR, and measured by tools/evaluate_rewards.py. What is finished is not run again.
"""

import json
import random
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

from geli.run.errors import run
from geli.run.options import fraction, new_parser, non_negative_float, positive_int


def parse_options(argv: Sequence[str] | None = None):
    """The options on the command line."""
    parser = new_parser("Train heads on the shares of an oracle that knows the truth.")
    parser.add_argument("out", type=Path, help="folder of everything; what is finished there is not run again")
    parser.add_argument("--data_dir", required=True, help="corpus that tools/plant_truth.py wrote (no default)")
    parser.add_argument("--encoder", required=True, help="hub id or folder of the heads' text encoder (no default)")
    parser.add_argument("--noise", type=non_negative_float, default=1.0, help="standard deviation of a turn's points")
    parser.add_argument("--faults", type=fraction, default=0.2, help="share of replies that are spoilt")
    parser.add_argument("--seeds", type=positive_int, default=3, help="heads of each kind")
    return parser.parse_args(argv)


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else None

from experiments.commands import finished_head, run_command
from experiments.loop import CONTEXT_TURNS, TRAIN_CONVERSATIONS
from tools.hidden_reward import hidden_reward

TURN = re.compile(r"^Turn (\d+), B: (.*?)(?: \(A looks \w+\))?$", re.MULTILINE)
KINDS = ("RRD", "IRCR", "LLM")


@contextmanager
def server(answer: Callable[[str], str | int], seconds: float = 0.0) -> Iterator[tuple[str, list[dict]]]:
    """An OpenAI-compatible server on this machine.

    Args:
        answer: text of a request -> the reply, or the status of an HTTP error. seconds: that a reply takes.

    Yields:
        Its address, and the list of requests that it got.
    """
    asked, finished = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            finished.wait(seconds)
            reply = answer(body["messages"][0]["content"])
            content = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
            self.send_response(reply if isinstance(reply, int) else 200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_):
            pass

        def handle(self):
            with suppress(OSError):  # the other side has hung up
                super().handle()

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", asked
    finally:
        finished.set()
        running.shutdown()
        running.server_close()


def oracle(text: str, noise: float, faults: float) -> str:
    """The oracle's reply, always the same to the same request.

    Args:
        noise: standard deviation, in points of 10. faults: share of replies that are spoiled.
    """
    rng = random.Random(text)
    lines = [
        f"{turn}: {min(max(5 + 5 * hidden_reward(said) + rng.gauss(0, noise), 0), 10):.1f}"
        for turn, said in TURN.findall(text)
    ]
    if rng.random() >= faults:
        return "\n".join(lines)
    spoil = {
        "missing turns": lambda: "\n".join(lines[:-1]),
        "extra turns": lambda: "\n".join([*lines, f"{len(lines) + 1}: 5", f"{len(lines) + 2}: 5"]),
        "no numbers": lambda: "I think that all turns of B contributed equally to the score.",
        "out of range": lambda: "\n".join([*lines[:-1], f"{len(lines)}: 100"]),
        "other words": lambda: "Sure!\n\n" + "\n".join(f"**Turn {line}/10** (good)" for line in lines),
        "JSON": lambda: f"```json\n{json.dumps(dict(line.split(': ') for line in lines))}\n```",
    }
    return spoil[rng.choice(list(spoil))]()


def head_commands(options, seed: int) -> Iterator[tuple[str, list]]:
    """(run name, command) of the heads of a seed, with the settings of experiments/closed_loop.py."""
    common = ["train_reward_GELI.py", "--train", "--val", "--small_model_shrink", "--data_dir", options.data_dir]
    common += ["--output_dir", options.out / "runs", "--lang_model_path", options.encoder, "--resume", "--seed", seed]
    common += ["--context_turns", CONTEXT_TURNS, "--train_size", TRAIN_CONVERSATIONS, "--epochs", 8, "--batch_size", 4]
    for kind in KINDS:
        more = ["--llm_shares", options.out / "shares" / "shares.csv"] if kind == "LLM" else []
        yield f"{kind}-{seed}", [*common, "--redist_type", kind, *more, "--run_name", f"{kind}-{seed}"]


def main(options) -> None:
    """Asks the oracle, trains the heads, and prints both tables."""
    out = options.out
    if not (out / "shares" / "shares.csv").is_file():
        with server(partial(oracle, noise=options.noise, faults=options.faults)) as (url, _):
            asked = ["--url", url, "--model", f"oracle-{options.noise:g}-{options.faults:g}", "--log_text"]
            asked += ["--train_size", TRAIN_CONVERSATIONS]
            run_command(out, "apps.llm_shares", options.data_dir, out / "shares", *asked)
    for seed in range(options.seeds):
        for name, command in head_commands(options, seed):
            if not finished_head(out / "runs", name):
                print(f"{name} …", flush=True)
                run_command(out, *command)
    settings = [f"{kind}={','.join(f'{kind}-{seed}' for seed in range(options.seeds))}" for kind in KINDS]
    measured = ["--data_dir", options.data_dir, "--output_dir", out / "runs", "--train_size", TRAIN_CONVERSATIONS]
    run_command(out, "tools/evaluate_rewards.py", *settings, *measured)
    print((out / "runs" / "rewards.md").read_text(encoding="utf-8"))
    print(f"Written:\n  {out / 'shares' / 'shares.json'}\n  {out / 'runs' / 'rewards.md'}")


if __name__ == "__main__":
    run(partial(main, OPTIONS))
