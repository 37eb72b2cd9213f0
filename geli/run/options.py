"""Options of the commands: each is declared once, as a field of a frozen dataclass, from which argparse is built.

A *group* holds the options of one part of the program, such as `RunOptions`. A command's options are a frozen dataclass
whose fields are groups; their values are the command's defaults:

    @dataclass(frozen=True)
    class Options:
        run: RunOptions = RunOptions(save_steps=500)
        data: DataOptions = DataOptions()

    options = parse(build_parser("What the command does.", Options()), Options())
    options.run.seed

Functions take the group that they need, and tests and benchmarks make groups without argparse.
"""

import argparse
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geli.run.errors import program_name

WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")

# ---------------------------------------------------------------------------------------------------------------------
# Types of option values


def _number(kind: type, expected: str, allowed: Callable[[Any], bool]) -> Callable[[str], Any]:
    """The type of an option whose value is a number: a function that reads a text, or says what is `expected`."""

    def read(text: str):
        try:
            value = kind(text) if kind is float or text.removeprefix("+").isdecimal() else math.nan
        except ValueError:
            value = math.nan
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{expected} is expected, not {text!r}")
        return value

    return read


positive_int = _number(int, "a whole number of at least 1", lambda value: value >= 1)
non_negative_int = _number(int, "a whole number of at least 0", lambda value: value >= 0)
positive_float = _number(float, "a number above 0", lambda value: 0 < value < math.inf)
non_negative_float = _number(float, "a number of at least 0", lambda value: 0 <= value < math.inf)
fraction = _number(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
# as Python, NumPy and torch all accept it
seed = _number(int, "a whole number from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32)


def episode_length(text: str) -> int | str:
    """A number of turns, or `actual`."""
    return text if text == "actual" else positive_int(text)


def file_name(text: str) -> str:
    """A name that becomes a part of file names, so it cannot be a path."""
    if not text or text.startswith(".") or any(c in text for c in "/\\\0") or text != text.strip():
        raise argparse.ArgumentTypeError(f"a plain name (no slashes, no leading dot) is expected, not {text!r}")
    return text


def text_or_file(text: str) -> str:
    """A text, or the content of the file of that name; not empty."""
    try:
        found = Path(text).read_text(encoding="utf-8").strip() if len(text) < 4096 and Path(text).is_file() else text
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: not a readable text file ({error})") from None
    names_a_file = found is text and " " not in text and ("/" in text or Path(text).suffix)
    if not found.strip() or names_a_file:
        raise argparse.ArgumentTypeError(f"a text, or an existing file with one, is expected, not {text!r}")
    return found.strip()


# ---------------------------------------------------------------------------------------------------------------------
# Declaring options, and parsing them


def option(
    default, help: str, *, type: Callable[[str], Any] | None = None, choices: Iterable[str] | None = None,
    metavar: str | None = None, flag: str | None = None, nargs: str | None = None, exclusive: str | None = None,
):  # fmt: skip
    """A field of an option group.

    Args:
        default: the value without the option. False makes a switch, which takes no value; where a
            preset sets it, `--no-NAME` unsets it.
        help: shown by `--help`, with the default behind it unless it mentions a default.
        flag: the option's name, where it is not that of the field.
        exclusive: title of a set of options of which at most one may be given.
        type, choices, metavar, nargs: as in `argparse`.
    """
    declared = dict(help=help, type=type, choices=choices, metavar=metavar, flag=flag, nargs=nargs, exclusive=exclusive)
    return dataclasses.field(default=default, metadata=declared)


class _Parser(argparse.ArgumentParser):
    """A parser that prints errors in one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to an option's help unless the help mentions one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        explained = action.default is None or "default" in (action.help or "")
        return action.help if explained else super()._get_help_string(action)


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose `--help` shows every default and whose options cannot be abbreviated."""
    return _Parser(prog=program_name(), description=description, formatter_class=_HelpFormatter, allow_abbrev=False)


def build_parser(description: str, options) -> argparse.ArgumentParser:
    """A parser of the options in all groups of `options`, whose values are the defaults.

    A group's fields that were not made by `option` are not on the command line. A group with an attribute `title`
    stands under it in `--help`.
    """
    parser = new_parser(description)
    titled: dict[str, Any] = {}  # title -> what its options are added to
    for group, field in _declared(options):
        declared = dict(field.metadata)
        exclusive, flag = declared.pop("exclusive"), declared.pop("flag") or f"--{field.name}"
        title = exclusive or getattr(group, "title", None)
        default = getattr(group, field.name)
        declared = {key: value for key, value in declared.items() if value is not None}
        if default is False:
            declared["action"] = "store_true"
        elif default is True:  # by a preset
            declared["action"] = argparse.BooleanOptionalAction
        if title and title not in titled:
            under = parser.add_argument_group(title)
            titled[title] = under.add_mutually_exclusive_group() if exclusive else under
        titled.get(title, parser).add_argument(flag, dest=field.name, default=default, **declared)
    return parser


def parse(parser: argparse.ArgumentParser, options, argv: Sequence[str] | None = None):
    """`options` with the values of the command line (`argv`, by default that of the process)."""
    values = vars(parser.parse_args(argv))
    mode = os.environ.get("WANDB_MODE") or "online"
    if mode not in WANDB_MODES:
        parser.error(f"WANDB_MODE={mode}: expected {', '.join(WANDB_MODES[:3])} in the environment")
    groups = {}
    for field in dataclasses.fields(options):
        group = getattr(options, field.name)
        given = {f.name: values[f.name] for f in dataclasses.fields(group) if f.metadata}
        groups[field.name] = dataclasses.replace(group, **given)
    return dataclasses.replace(options, **groups)


def read_options(description: str, presets: Mapping[str | None, Any], argv: Sequence[str] | None = None):
    """The options of a command with `--preset` as `parse` reads them, the parser, and the names of the given options.

    Args:
        presets: value of `--preset`, None without it -> the options whose values are then the defaults.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset")
    try:
        chosen = first.parse_known_args(argv)[0].preset
    except argparse.ArgumentError:  # without a value, which `parse` reports, as one that is not there
        chosen = None
    defaults = presets.get(chosen, presets[None])
    parser = build_parser(description, defaults)
    return parse(parser, defaults, argv), parser, given_options(parser, argv)


def given_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> set[str]:
    """Names of the options that the command line (`argv`, by default that of the process) gives, with any value."""
    missing = object()
    unset = argparse.Namespace(**{action.dest: missing for action in parser._actions})
    return {name for name, value in vars(parser.parse_args(argv, unset)).items() if value is not missing}


def refuse(parser: argparse.ArgumentParser, given: set[str], names: str, reason: str) -> None:
    """Ends the program with one line if any of these options were given, because they would do nothing.

    Args:
        given: what `given_options` returned. names: of options, separated by spaces. reason: why, and what to do.
    """
    flags = [a.option_strings[-1] for a in parser._actions if a.dest in given and a.dest in names.split()]
    if flags:
        parser.error(f"{', '.join(flags)}: {reason}")


def flat(options) -> dict[str, Any]:
    """Name -> value of every option, as it is recorded with a run."""
    return {field.name: getattr(group, field.name) for group, field in _declared(options)}


def _declared(options):
    """(group, field) of every option."""
    for field in dataclasses.fields(options):
        group = getattr(options, field.name)
        yield from ((group, option) for option in dataclasses.fields(group) if option.metadata)


# ---------------------------------------------------------------------------------------------------------------------
# The options that all three stages have


def runs_folder() -> str:
    """The default of `--output_dir`: the environment variable GELI_OUTPUT_DIR, else the nearest folder, from here up,
    that has `rlmf_weights/`, else the current one."""
    here = Path.cwd()
    found = next((folder for folder in (here, *here.parents) if (folder / "rlmf_weights").is_dir()), here)
    return os.environ.get("GELI_OUTPUT_DIR") or os.path.relpath(found)


OUTPUT_DIR = "(default: $GELI_OUTPUT_DIR, else the nearest folder here or above that has rlmf_weights/, else here)"


@dataclass(frozen=True)
class RunOptions:
    """How a command runs and where it writes."""

    output_dir: str = option(runs_folder(), f"folder under which the output folders are made {OUTPUT_DIR}")
    run_name: str | None = option(None, "name of the run (default: wandb's, or one like it)", type=file_name)
    seed: int = option(0, "seed of every random choice", type=seed)
    device: str = option("auto", "auto is a GPU if there is one", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option(
        "auto",
        "of forward and backward passes; auto is bfloat16 where the hardware has it (weights stay float32)",
        choices=("auto", "float32", "bfloat16"),
    )
    resume: bool = option(
        False, "resume the newest unfinished run with the same options (with --run_name: that run) from its checkpoint"
    )
    save_steps: int = option(
        100,
        "steps between two checkpoints that --resume can start from, and of stage 3 between two saved policies",
        type=positive_int,
    )
    no_cache: bool = option(False, "neither read nor write OUTPUT_DIR/cache")
    trust_remote_code: bool = option(
        False, "run code that a model's folder or hub repository brings along (without it such a model is refused)"
    )
    log_text: bool = option(False, "log conversations' text and ids to wandb (never otherwise)")

    @property
    def cache_dir(self) -> Path | None:
        """Folder of the caches; None with `--no_cache`."""
        return None if self.no_cache else Path(self.output_dir) / "cache"
