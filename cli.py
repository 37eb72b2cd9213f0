"""What the entry scripts share on the command line: options, their defaults, and how a user's mistake is reported.

Nothing heavy is imported here, so that `--help` answers at once.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

# The survey questions that can be the score of a conversation -> points per unit of the answer. Answers run 1-9 or
# 1-7 and are put on one scale with the two that are given in 0-100.
REWARD_CLASSES = {
    "you_are_funny": 10,
    "you_are_intelligent": 10,
    "our_thoughts_synced_up_sr1": 10,
    "you_are_humble": 10,
    "end_affect": 10,
    "overall_affect": 10,
    "overall_memory_rating": 10,
    "how_enjoyable": 10,
    "i_like_you": 10,
    "in_common": 10,
    "conversationalist": 1,
    "good_for_advice": 1,
    "you_are_quickwitted": 10,
    "you_are_competent": 10,
    "you_are_kind": 10,
    "you_are_friendly": 10,
    "you_are_warm": 10,
}

# Alias of `--model` -> the hub id that it stands for.
ENCODERS = {
    "convo": "kabita-choudhary/finetuned-bart-for-conversation-summary",
    "longformer": "allenai/longformer-base-4096",
    "longT5": "Stancld/longt5-tglobal-large-16384-pubmed-3k_steps",
    "LLAMA2": "meta-llama/Llama-2-7b-chat-hf",
}
ADAPTED = ("LLAMA2",)  # of these a LoRA adapter is trained instead of all weights

# Option that chooses a reward head -> what it is. Each is also the head's name in `models.HEADS`.
HEAD_OPTIONS = {
    "small_model_shrink": "h-128-1, dropout 0.2 after each linear layer, tanh at the end",
    "small_model": "h-128-32-1, ReLU",
    "batch_norm": "the default head with LayerNorm after each hidden layer",
    "hard_shrink": "the default head with a GELU at the end",
}

TRANSCRIPTS = ("cliffhanger", "audiophile", "backbiter")


class UserError(Exception):
    """A mistake that the user can mend: what was expected, what was found, where, and what to do, in one line."""


class Stopped(SystemExit):
    """A signal ended the run, in good order. Args: message: what to say. code: the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(code)
        self.message = message


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line (argparse prints the whole usage before them)."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to an option's help, unless the help says itself what happens without the option."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default is None or "default" in (action.help or "")
        return action.help if said else super()._get_help_string(action)


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose `--help` shows every default and whose options cannot be abbreviated."""
    return _Parser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text) if text.lstrip("+-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is expected, not {text!r}")
    return value


def count(text: str) -> int:
    """argparse type: an integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number of at least 0 is expected, not {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"a number above 0 is expected, not {text!r}")
    return value


def fraction(text: str) -> float:
    """argparse type: a number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"a number from 0 to 1 is expected, not {text!r}")
    return value


def seed(text: str) -> int:
    """argparse type: a seed that Python, NumPy and torch all take."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"a whole number from 0 to 2**32 - 1 is expected, not {text!r}")
    return int(text)


def episode_length(text: str) -> int | str:
    """argparse type of `--ep_len`: a whole number of turns, or `actual`."""
    return text if text == "actual" else positive_int(text)


def file_name(text: str) -> str:
    """argparse type: a name that becomes part of a file's name, so never a path."""
    if not text or text.startswith(".") or any(c in text for c in "/\\\0") or text != text.strip():
        raise argparse.ArgumentTypeError(f"a plain name (no slashes, no leading dot) is expected, not {text!r}")
    return text


def add_common_options(
    parser: argparse.ArgumentParser, learning_rate: float, context_turns: int, save_steps: int
) -> None:
    """Options of all three stages; the other arguments are the stage's own defaults."""
    add = parser.add_argument
    add("--data_dir", default="./candor", help="folder with one folder a conversation, in CANDOR's layout")
    add("--output_dir", default=".", help="folder under which the output folders are made")
    add("--transcript", choices=TRANSCRIPTS, default="cliffhanger", help="which of CANDOR's transcripts is read")
    add("--context_turns", type=positive_int, default=context_turns, help="turns of context before an agent turn")
    add("--max_length", type=positive_int, default=1024, help="encoder tokens; less if the encoder's limit is lower")
    add("--learning_rate", type=positive_float, default=learning_rate, help="peak learning rate")
    add("--seed", type=seed, default=0, help="seed of every random choice")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto is a GPU when there is one")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of forward and backward passes; auto is bfloat16 where the hardware has it (weights stay float32)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the newest unfinished run that was started with the same options (or --run_name's), exactly",
    )
    add("--save_steps", type=positive_int, default=save_steps, help="steps between two states that --resume starts at")
    add(
        "--trust_remote_code",
        action="store_true",
        help="run code that a model's folder or hub repository brings along (else such a model is refused)",
    )
    add("--no_cache", action="store_true", help="neither use nor write OUTPUT_DIR/cache")
    add("--log_text", action="store_true", help="log conversations' text and ids to wandb (never otherwise)")


def add_reward_options(parser: argparse.ArgumentParser, epochs: int) -> None:
    """Options of the two stages that train a reward (`epochs`: the stage's own default)."""
    add = parser.add_argument
    add("--reward_class", choices=REWARD_CLASSES, default="overall_affect", metavar="CLASS", help=_classes_help())
    add("--model", default="convo", help=f"the text encoder: {', '.join(ENCODERS)}, or any hub id or folder")
    add("--lang_model_path", help="hub id or folder of an encoder instead of --model's own (default: --model's own)")
    add("--train_size", type=positive_int, default=500, help="training conversations (fewer if there are fewer)")
    add("--val", action="store_true", help="evaluate on the validation conversations")
    add(
        "--val_all",
        action="store_true",
        help="with --val: on every conversation behind the training ones, not on the last 50 (or tenth) alone",
    )
    add("--train", action="store_true", help="train (stage 1 trains whether or not it is given)")
    add("--epochs", type=positive_int, default=epochs, help="passes over the training conversations")
    add("--run_name", type=file_name, help="name of the run (default: wandb's, or one like it)")
    add("--ep_len", type=episode_length, default=160, help="L of the return, in turns, or 'actual' for each one's own")
    add(
        "--reaction_type",
        choices=("class", "mean"),
        default="class",
        help="LI target: from the turn's most frequent face class, or the share of frames that are happy",
    )
    add(
        "--negative_affect",
        choices=("zero", "negative"),
        default="zero",
        help="LI target of anger, contempt, disgust, fear and sadness: 0 or -1",
    )
    add(
        "--li_signal",
        choices=("face", "sentiment"),
        help="where LI targets come from: the listener's face during the turn, or the sentiment of the user's next "
        "turn (default: in stage 2 that of --affect_path's run, else face)",
    )
    add(
        "--sentiment_model",
        metavar="MODEL",
        help="hub id or folder of a text classifier for --li_signal sentiment (default: TextBlob's lexicon)",
    )
    add("--contrastive", action="store_true", help="every second epoch add a supervised contrastive loss by affect")
    add("--curriculum", action="store_true", help="in training, show the encoder the user's answer after the response")
    add(
        "--curriculum_exposure",
        action="store_true",
        help="show the answer with a probability that falls from 1 to 0 over the epochs",
    )
    add(
        "--tokens_per_batch",
        type=positive_int,
        help="padded tokens that the encoder takes at once (default: what fits into memory)",
    )
    add("--compile", action="store_true", help="torch.compile the encoder (slow to start, then faster on a GPU)")
    add("--bar_chart", action="store_true", help="log bar charts of predicted reward by turn to wandb (with --val)")
    heads = parser.add_argument_group("reward head (default: h-768-128-32-1, ReLU)").add_mutually_exclusive_group()
    for name, what in HEAD_OPTIONS.items():
        heads.add_argument(f"--{name}", action="store_true", help=what)


def named_encoder(args: argparse.Namespace) -> tuple[str, str]:
    """The hub id or folder of the encoder that the options name, and the option that names it."""
    if args.lang_model_path:
        return args.lang_model_path, "--lang_model_path"
    return ENCODERS.get(args.model, args.model), "--model"


def cache_folder(args: argparse.Namespace) -> Path | None:
    """Where what was read and encoded is kept, if it is."""
    return None if args.no_cache else Path(args.output_dir) / "cache"


def head_name(args: argparse.Namespace) -> str:
    """The head that the options choose: a key of `models.HEADS`."""
    return next((name for name in HEAD_OPTIONS if getattr(args, name)), "default")


def check_reward_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses options of the reward stages that would do nothing."""
    if args.val_all and not args.val:
        parser.error("--val_all says on what --val evaluates: give --val too")
    if args.bar_chart and not args.val:
        parser.error("--bar_chart draws the validation turns: give --val too")
    if args.sentiment_model and args.li_signal == "face":
        parser.error("--sentiment_model is for --li_signal sentiment")


def _classes_help() -> str:
    return "the survey question that is the score: " + ", ".join(REWARD_CLASSES)


def new_folder(path: Path) -> None:
    """Refuses a folder to write to that has something in it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: expected a new or empty folder, found files in it; name another or remove it")


def one_line(text: str) -> str:
    """The text in one line, without anything that a terminal would obey, whatever file it quotes."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _fail(error: Exception) -> None:
    rank = os.environ.get("RANK", "0")
    who = os.path.basename(sys.argv[0]) + (f" (rank {rank})" if rank != "0" else "")
    print(f"{who}: error: {one_line(str(error))}", file=sys.stderr)
    sys.exit(2)


def run(main: Callable[[], None]) -> None:
    """Runs an entry script's `main`: a `UserError` becomes one line on stderr and exit code 2."""
    # of libraries among themselves; no user can act on them
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\.")
    try:
        main()
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"{os.path.basename(sys.argv[0])}: {stop.message}", file=sys.stderr)
        sys.exit(stop.code)
    except UserError as error:
        _fail(error)
    except OSError as error:  # a folder that cannot be written to, a full disk
        _fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
