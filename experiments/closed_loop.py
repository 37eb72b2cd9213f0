"""Shows whether a policy gets better by a reward that no training saw.

    python experiments/closed_loop.py OUT --data_dir CORPUS --encoder FOLDER

Plants a hidden reward on the corpus' sentences, trains LI, GE and GELI heads, aligns a small policy with each of them,
with the hidden reward itself and with a random one, and compares the hidden reward of its responses before and after,
for the KL that was spent. Run it again to continue where it stopped. When its policy is there, processes with other
--seeds can share OUT.
"""

import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

from experiments.loop_options import LoopOptions
from geli.run.errors import run
from geli.run.options import new_parser, positive_int, seed


def parse_options(argv: Sequence[str] | None = None):
    """The command line."""
    parser = new_parser("Show whether a policy gets better by a reward that no training saw.")
    parser.add_argument("out", type=Path, help="folder of everything; what is finished there is not run again")
    parser.add_argument("--data_dir", required=True, help="corpus in CANDOR's layout, whose sentences are used")
    parser.add_argument("--encoder", required=True, help="hub id or folder of the heads' text encoder")
    parser.add_argument("--policy", help="small: trained here; or as --model_name of train_rl_GELI.py")
    parser.add_argument("--prompt_format", help="of another policy than small, as in train_rl_GELI.py")
    parser.add_argument("--rewards", nargs="+", help="GELI, GE, LI, truth, random ('GELI --heads 5': with options)")
    parser.add_argument("--seeds", type=seed, nargs="+", help="seeds of training")
    parser.add_argument("--algorithms", nargs="+", help="of stage 3 ('ppo --lam 1': with options), or best-of-N")
    parser.add_argument("--steps", type=positive_int, help="steps of each policy")
    parser.add_argument("--save_steps", type=positive_int, help="steps between two checkpoints that are measured")
    parser.add_argument("--prompts", type=positive_int, help="held-out prompts of a seed")
    parser.add_argument(
        "--shared", type=Path,
        help="folder of an earlier command, whose planted corpus, small policy and heads are used; missing ones are "
        "added to it (default: OUT)"
    )  # fmt: skip
    parser.add_argument("--device", help="of the commands: auto, cpu, cuda or mps")
    parser.add_argument("--dtype", help="of the policies, as in train_rl_GELI.py")
    parser.add_argument(
        "--evaluate", nargs=3, metavar=("REWARD", "ALGO", "SEED"), help="evaluate that finished run alone"
    )
    parser.set_defaults(**{field.name: field.default for field in fields(LoopOptions) if field.default is not MISSING})
    return parser.parse_args(argv)


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else None

from experiments.loop import PolicyRun, closed_loop, evaluate_run


def main(options) -> None:
    """Runs the experiment, or evaluates one of its runs."""
    settings = {name: value for name, value in vars(options).items() if name != "evaluate"}
    settings |= {name: tuple(settings[name]) for name in ("seeds", "rewards", "algorithms")}
    loop = LoopOptions(**settings)
    if options.evaluate:
        reward, algo, number = options.evaluate
        evaluate_run(loop, PolicyRun(reward, algo, int(number)))
    else:
        closed_loop(loop)


if __name__ == "__main__":
    run(partial(main, OPTIONS))
