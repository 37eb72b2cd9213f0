"""The terminal's commands through pipes, with a policy of letters; ways of leaving."""

import io
import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from talks import LetterPolicy

from apps.chat import terminal
from apps.chat.collect import Collection
from apps.chat.partner import Partner
from apps.chat.talk import Talk
from apps.chat.terminal import COMMANDS, Terminal, longest, printable, reward_bar


class LetterScorer:
    """Stands in for a `GELIReward`: the reward falls with the number of letters."""

    name = "reward1_letters"

    def features(self, pairs):
        return torch.tensor([[float(len(response.removeprefix("AI: ")))] for _, response in pairs])

    def rewards(self, features):
        return [1 - feature.item() / 4 for feature in features]


@pytest.fixture
def converse(monkeypatch, capsys, tmp_path):
    """Runs the terminal on a list of lines; returns what it printed."""

    def run(lines, *replies, scorer=None, compare=False, collection=None, at_end=None, **settings) -> str:
        partner = Partner(LetterPolicy(*(f"{reply}|" for reply in replies)), "llama", tuned=True)

        class Input(io.StringIO):
            def readline(self, *_):
                line = super().readline()
                return at_end() if not line and at_end else line

        monkeypatch.setattr(sys, "stdin", Input("".join(f"{line}\n" for line in lines)))
        monkeypatch.chdir(tmp_path)
        try:
            Terminal(lambda: Talk(partner, scorer, **settings), compare, collection, "end_affect").run()
        finally:
            run.printed = capsys.readouterr().out
        return run.printed

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def test_bars_by_hand():
    assert longest([]) == longest([0.2, -0.9]) == 1 and longest([0.5, -2.5]) == 2.5
    assert reward_bar(0.5, 1) == "+0.500           |█████     "
    assert reward_bar(-0.2, 1) == "-0.200         ██|          "
    assert reward_bar(7, 1) == "+7.000           |██████████"  # no bar is longer
    assert reward_bar(0, 1) == "+0.000           |          "


def test_no_control_character_reaches_the_terminal():
    text = "a\x1b[31mred\x07\x9b1m\rb\tc\nd 日本 👩\u200d💻 <b>&amp;"
    assert printable(text) == "a�[31mred��1m�b�c\nd 日本 👩\u200d💻 <b>&amp;"


# ---------------------------------------------------------------------------------------------------------------------
# Talking


def test_replies_are_printed_as_text(converse):
    printed = converse(["Hello", " /not a command", "", "日本 🙂"], "<b>Hi</b>\x1b[2J", "你好\nworld", "👋")
    assert printed.splitlines()[1:] == ["AI: <b>Hi</b>�[2J", "AI: 你好", "world", "AI: 👋", ""]


def test_a_reply_that_was_written_differently_is_printed_again(converse, monkeypatch):
    monkeypatch.setattr(Partner, "stream", lambda *_: iter(["do", "do n", "don't"]))
    assert converse(["one"]).splitlines()[1:] == ["AI: do n", "AI: don't", ""]


def test_each_reply_has_its_reward_and_the_base_policys_reply_beside_it(converse):
    printed = converse(["one"], "ab", "abcdef", scorer=LetterScorer(), compare=True)
    assert printed.splitlines()[1:5] == [
        "AI: ab", f"    reward {reward_bar(0.5, 1)}", "Base: ......", f"    reward {reward_bar(-0.5, 1)}",
    ]  # fmt: skip


def test_all_rewards_are_bars_of_one_scale(converse):
    long = "x" * 45
    printed = converse(["/reward", "one", "two", "/reward"], "ab", long, scorer=LetterScorer())
    assert "0 rewards by" in printed
    assert printed.splitlines()[-4:-1] == [
        "2 rewards by reward1_letters:",
        f"    1 {reward_bar(0.5, 10.25)} ab",
        f"    2 {reward_bar(-10.25, 10.25)} {'x' * 40}…",
    ]


def test_undo_and_retry(converse):
    printed = converse(["one", "/retry", "/undo", "/undo", "/retry", "two"], "a", "b", "c")
    assert printed.splitlines()[1:] == [
        "AI: a", "AI: b", "Taken back: one", "! nothing has been said yet", "! there is no message to reply to",
        "AI: c", "",
    ]  # fmt: skip


def test_help_lists_every_command_and_unknown_ones_are_answered(converse):
    printed = converse(["/help", "/nope\x1b", "/"])
    assert all(f"  /{name} " in printed for name in COMMANDS)
    assert "! unknown command /nope�; /help lists the commands" in printed and "! unknown command /;" in printed


def test_rating(converse):
    lines = ["/rate 12", "/rate", "8", "/rate height 3", "/rate good_for_advice 55", "/rate end_affect", "x", "/save r"]
    printed = converse(lines)
    assert "! end_affect: a number from 1 to 9 is expected, not '12'" in printed
    assert "Noted: end_affect 8. More, if you like: /rate QUESTION ANSWER" in printed
    assert "! 'height' is no question; the questions are you_are_funny" in printed
    assert "! end_affect: a number from 1 to 9 is expected, not 'x'" in printed and "is not collected" in printed
    with open("r") as file:
        assert json.load(file)["answers"] == {"end_affect": 8, "good_for_advice": 55}


def test_saving(converse, tmp_path):
    printed = converse(
        ["one", "/smile", "/save", "two", "/save", "/save a.json", "/save a.json", "/save no/x"], "hé 你", "b"
    )
    (own,) = tmp_path.glob("talk-*.json")  # is written again
    assert printed.count(f"Written: {own.name}") == 2 and "! a.json exists; name a new file" in printed
    record = json.loads(own.read_text())
    assert own.stat().st_mode & 0o077 == 0 and "你" in own.read_text() and own.stem == f"talk-{record['id']}"
    turns = [(turn["speaker"].split("-")[0], turn["text"], turn["reaction"]) for turn in record["turns"]]
    assert turns == [
        ("person", "one", None), ("policy:llama", "hé 你", "happiness"), ("person", "two", None),
        ("policy:llama", "b", None),
    ]  # fmt: skip
    assert (tmp_path / "no" / "x").is_file()


def test_without_a_head_there_are_no_rewards_to_show(converse):
    assert "! there is no reward head: name one with --reward_path" in converse(["/reward"])


# ---------------------------------------------------------------------------------------------------------------------
# Collecting, and leaving


@pytest.fixture
def collection(tmp_path):
    return Collection(tmp_path / "talks")


def test_consent_is_asked_once_before_anything_is_said(converse, collection):
    printed = converse(["yes", "one", "/rate 5", "/new", "two", "/frown", "/rate 2"], "a", "b", collection=collection)
    assert printed.count("If you agree") == 1 and collection.counts() == (2, 0)
    assert printed.count("2 finished, 0 broken off") == 1 and "It will be stored." in printed


@pytest.mark.parametrize("answer", ["no", "", "yes please", "/quit"])
def test_without_a_yes_nothing_is_stored(answer, converse, collection):
    printed = converse([answer, "one", "/rate 5", "/new", "two"], "a", "b", collection=collection)
    assert "Nothing will be stored." in printed and collection.counts() == (0, 0)


def test_quit_offers_to_rate_first(converse, collection):
    lines = ["y", "one", "/quit"]
    assert "9: very good) An empty line leaves without a rating." in converse([*lines, "7"], "a", collection=collection)
    assert "as broken off, because it was not rated" in converse([*lines, ""], "a", collection=collection)
    assert "! end_affect: a number" in converse([*lines, "x", "/quit", "3"], "a", collection=collection)
    assert collection.counts() == (2, 1)


def interrupt():
    raise KeyboardInterrupt


def end_process(number):
    os.kill(os.getpid(), number)
    signal.pause()


@pytest.mark.parametrize(
    ("at_end", "code"),
    [
        (None, None),  # the end of input
        (interrupt, None),  # Ctrl-C
        (lambda: end_process(signal.SIGTERM), 143),
        (lambda: end_process(signal.SIGHUP), 129),  # the window was closed
    ],
)
@pytest.mark.parametrize("rated", [True, False])
def test_every_way_of_leaving_keeps_the_conversation(at_end, code, rated, converse, collection):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    lines = ["y", "one", *(["/rate 5"] if rated else [])]
    try:
        converse(lines, "a", collection=collection, at_end=at_end)
        assert code is None
    except SystemExit as left:
        assert left.code == code
    assert collection.counts() == ((1, 0) if rated else (0, 1))
    assert f"{collection.counts()[0]} finished, {collection.counts()[1]} broken off" in converse.printed
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == handlers


def test_ctrl_c_in_the_middle_of_a_reply_keeps_what_was_said_before(converse, collection, monkeypatch):
    sample = LetterPolicy.sample

    def stop_at_x(self, states, uniforms):
        token = sample(self, states, uniforms)
        return interrupt() if token.item() == ord("x") else token

    monkeypatch.setattr(LetterPolicy, "sample", stop_at_x)
    converse(["y", "one", "two", "three"], "ab", "cxd", collection=collection)
    (folder,) = (collection.broken_off).iterdir()
    rows = (folder / "transcription" / "transcript_cliffhanger.csv").read_text().splitlines()
    assert [row.split(",")[4] for row in rows[1:]] == ["one", "ab", "two"]


def in_a_terminal(monkeypatch) -> None:
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)


def test_writing_a_message_is_noticed_and_writing_a_command_is_not(monkeypatch):
    in_a_terminal(monkeypatch)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # only a process' main thread can handle signals

    def type_two_lines() -> list:
        noticed = []
        with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
            read = terminal.line_reader(lambda: noticed.append(1))
            keyboard.send_text("/smile\r")
            first = read("You: "), len(noticed)
            keyboard.send_text("日本 👋\r")
            return [first, (read("You: "), len(noticed) > 0)]

    # in a thread of its own, since a browser test before it may have left an event loop in this one
    with ThreadPoolExecutor() as pool:
        assert pool.submit(type_two_lines).result() == [("/smile", 0), ("日本 👋", True)]


def test_ctrl_c_while_the_editor_starts_counts_once_it_has_started():
    left = []

    class Starting:
        app = SimpleNamespace(exit=lambda exception: left.append(exception))

        def prompt(self, _, pre_run):
            os.kill(os.getpid(), signal.SIGINT)
            pre_run()

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        terminal.edited_line(Starting(), "You: ")
    assert left == [KeyboardInterrupt] and signal.getsignal(signal.SIGINT) is before


def test_without_prompt_toolkit_a_terminal_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "PromptSession", None)
    in_a_terminal(monkeypatch)
    assert terminal.line_reader(lambda: None) is input
    assert "pip install -r apps/chat/requirements.txt" in capsys.readouterr().out
