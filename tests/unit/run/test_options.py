"""Options: their types, how a parser is built from their declarations, and how mistakes are answered."""

import argparse
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest

from geli.run.options import (
    RunOptions,
    build_parser,
    episode_length,
    file_name,
    flat,
    fraction,
    given_options,
    new_parser,
    non_negative_int,
    option,
    parse,
    positive_float,
    positive_int,
    read_options,
    refuse,
    runs_folder,
    seed,
    text_or_file,
)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (positive_int, "1", 1),
        (positive_int, "+3", 3),
        (non_negative_int, "0", 0),
        (positive_float, "1e-5", 1e-5),
        (fraction, "0", 0.0),
        (fraction, "1", 1.0),
        (seed, "4294967295", 2**32 - 1),
        (episode_length, "actual", "actual"),
        (episode_length, "160", 160),
        (file_name, "a run-1", "a run-1"),
    ],
)
def test_values_of_each_type(kind, text, value):
    assert kind(text) == value and type(kind(text)) is type(value)


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (positive_int, ("0", "-1", "1.5", "x", "", "²")),
        (non_negative_int, ("-1", "1.5", "x", "")),
        (positive_float, ("0", "-1", "nan", "inf", "x")),
        (fraction, ("-0.1", "1.1", "nan", "x")),
        (seed, ("-1", "4294967296", "x")),
        (episode_length, ("0", "Actual")),
        (file_name, ("", ".x", "../x", "a/b", "a\\b", " a", "a\0")),
    ],
)
def test_values_that_each_type_refuses(kind, texts):
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match="expected, not"):
            kind(text)


@dataclass(frozen=True)
class Sizes:
    """A group."""

    width: int = option(3, "how wide", type=positive_int)
    weight: float | None = option(None, "how heavy (default: 0.5)", type=fraction, flag="--lambda", metavar="L")
    names: list[str] | None = option(None, "some names", nargs="+")
    internal: int = 7


@dataclass(frozen=True)
class Kinds:
    """Another group."""

    red: bool = option(False, "paint it red", exclusive="color")
    blue: bool = option(False, "paint it blue", exclusive="color")
    size: str = option("small", "which size", choices=("small", "large"))


@dataclass(frozen=True)
class Old:
    """A group with a title."""

    title = "old ones"
    old: bool = option(False, "nothing")


@dataclass(frozen=True)
class Options:
    """A command's options, with a default of its own."""

    sizes: Sizes = Sizes(width=5)
    kinds: Kinds = Kinds()
    old: Old = Old()


def parsed(*argv):
    return parse(build_parser("A command.", Options()), Options(), argv)


def test_without_options_the_defaults_are_those_of_the_command():
    assert parsed() == Options() and parsed().sizes.width == 5
    assert flat(parsed()) == {
        "width": 5, "weight": None, "names": None, "red": False, "blue": False, "size": "small",
        "old": False,
    }  # fmt: skip


def test_each_option_reaches_its_group_with_its_type():
    options = parsed("--width", "9", "--lambda", "0.25", "--names", "a", "b", "--blue", "--size", "large")
    assert options.sizes == Sizes(9, 0.25, ["a", "b"], 7)
    assert options.kinds == Kinds(False, True, "large")
    with pytest.raises(FrozenInstanceError):
        options.sizes.width = 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--width", "0"], "argument --width: a whole number of at least 1 is expected, not '0'"),
        (["--red", "--blue"], "argument --blue: not allowed with argument --red"),
        (["--size", "huge"], "argument --size: invalid choice: 'huge'"),
        (["--wid", "1"], "unrecognized arguments: --wid 1"),  # no abbreviations
        (["--internal", "1"], "unrecognized arguments: --internal 1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert f"error: {message}" in error and error.endswith("(see --help)\n")


def test_an_option_counts_as_given_also_with_its_default():
    parser = build_parser("A command.", Options())
    assert given_options(parser, ("--width", "5", "--lambda", "0.5", "--names", "a", "--old")) == {
        "width", "weight", "names", "old"
    }  # fmt: skip
    assert given_options(parser, ()) == set()


def test_given_options_are_refused_in_one_line(capsys):
    parser = build_parser("A command.", Options())
    given = given_options(parser, ("--width", "5", "--lambda", "1"))
    refuse(parser, given, "names size", "were not given")
    with pytest.raises(SystemExit) as stop:
        refuse(parser, given, "names weight width", "do nothing without --red: give it")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "error: --width, --lambda: do nothing without --red: give it" in error


def test_help_says_what_each_option_means_and_its_default():
    text = " ".join(build_parser("A command.", Options()).format_help().split())
    for words in ("A command.", "--width WIDTH how wide (default: 5)", "--lambda L how heavy (default: 0.5)", "color:"):
        assert words in text
    assert "old ones: --old nothing (default: False)" in text
    assert "some names (default" not in text  # None means nothing is given
    parser = new_parser("A tool.")
    parser.add_argument("--n", type=positive_int, default=4, help="how many")
    assert "how many (default: 4)" in " ".join(parser.format_help().split())


def test_no_cache_means_no_folder():
    assert RunOptions(output_dir="out").cache_dir == Path("out/cache")
    assert RunOptions(output_dir="out", no_cache=True).cache_dir is None


@dataclass(frozen=True)
class Preset:
    """A group with the preset."""

    preset: str | None = option(None, "defaults of others", choices=("small",))


@dataclass(frozen=True)
class WithPreset(Options):
    """The same options, and a preset."""

    preset: Preset = Preset()


def test_a_preset_sets_defaults_and_what_is_given_wins(capsys):
    small = WithPreset(sizes=Sizes(width=2), kinds=Kinds(size="large"), old=Old(old=True))
    presets = {None: WithPreset(), "small": small}

    def parsed(*argv):
        return read_options("A command.", presets, argv)[0]

    assert parsed() == WithPreset()
    assert read_options("A command.", presets, ["--width", "5"])[2] == {"width"}
    small = parsed("--preset", "small")
    assert small.sizes.width == 2 and small.kinds.size == "large" == parsed("--preset=small").kinds.size
    assert small.old.old and not parsed("--preset", "small", "--no-old").old.old
    given = parsed("--width", "5", "--preset", "small")  # 5 is the default without the preset
    assert given.sizes.width == 5 and given.kinds.size == "large"
    for wrong, message in ((["--preset"], "expected one argument"), (["--preset", "huge"], "invalid choice: 'huge'")):
        with pytest.raises(SystemExit):
            parsed(*wrong)
        assert message in capsys.readouterr().err


def test_a_text_or_the_file_of_that_name(tmp_path):
    (tmp_path / "told.txt").write_text("Help them. \n")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert text_or_file(str(tmp_path / "told.txt")) == "Help them." and text_or_file(" Be kind. ") == "Be kind."
    assert text_or_file("x" * 5000) == "x" * 5000
    for wrong in (
        str(tmp_path / "empty.txt"),
        str(tmp_path / "missing.txt"),
        "prompts/support",
        "support.md",
        " ",
        str(tmp_path / "binary"),
    ):
        with pytest.raises(argparse.ArgumentTypeError):
            text_or_file(wrong)


def test_runs_are_found_by_the_environment_or_the_nearest_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("GELI_OUTPUT_DIR", raising=False)
    inside = tmp_path / "runs" / "a" / "b"
    (tmp_path / "runs" / "rlmf_weights").mkdir(parents=True)
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    assert runs_folder() == "../.." and build_parser("", Options()) and RunOptions().output_dir
    monkeypatch.chdir(tmp_path)
    assert runs_folder() == "."
    monkeypatch.setenv("GELI_OUTPUT_DIR", "/elsewhere")
    assert runs_folder() == "/elsewhere"
