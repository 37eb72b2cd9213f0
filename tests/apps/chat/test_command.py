"""`python -m apps.chat` and `apps.chat.forget` as users run them: in a terminal, through pipes; conversations that are
collected, trained on, and forgotten."""

import io
import json
import os
import pty
import re
import select
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from conftest import ROOT, call_script, environment_of_its_own, small_model
from no_pictures import without_pictures
from small_models import write_head
from talks import HEADS, write_checkpoint

from apps.chat import __main__ as chat
from apps.chat.collect import Collection
from apps.chat.sessions import Sessions
from apps.chat.talk import Talk

TOOL, FORGET = "apps.chat", "apps.chat.forget"
# runs the tool, with 2,000 turns in each conversation before it begins
WITH_HISTORY = f"""
import sys
sys.path.insert(0, "{ROOT}")
from apps.chat import __main__ as chat
from apps.chat.talk import Talk, TalkTurn
from geli.run.errors import run

def long_talk(partner, scorer, **settings):
    talk = Talk(partner, scorer, **settings)
    features = scorer.features([("", "hello")])[0]
    for i in range(0, 2000, 2):
        talk.turns += [TalkTurn(False, f"message {{i}}", 3 * i, 3 * i + 1),
                       TalkTurn(True, f"reply {{i}}", 3 * i + 2, 3 * i + 4, features=features)]
    return talk

chat.Talk = long_talk
run(lambda: chat.main(chat.parse_options()))
"""


class TerminalSession:
    """A program in a pseudo-terminal.

    Attributes:
        output: what it has printed, without control sequences.
    """

    def __init__(self, *command):
        environment = environment_of_its_own(TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1", LANG="C.UTF-8")
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], [*map(str, command)], environment)
        self.raw = b""

    @property
    def output(self) -> str:
        text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", self.raw.decode(errors="replace"))
        return text.replace("\r", "")

    def wait_for(self, text: str, count: int = 1, seconds: float = 600.0) -> None:
        """Reads until the output has this text `count` times."""
        end = time.monotonic() + seconds
        while self.output.count(text) < count:
            assert time.monotonic() < end and self.read(end), f"no {text!r} in:\n{self.output[-3000:]}"

    def read(self, end: float) -> bool:
        """Reads what there is, or waits for it; False at the end of the output."""
        if select.select([self.file], [], [], max(0.0, end - time.monotonic()))[0]:
            try:
                self.raw += (part := os.read(self.file, 1 << 16))
            except OSError:  # the program has ended
                return False
            return bool(part)
        return True

    def type(self, text: str) -> None:
        """Types on the keyboard."""
        os.write(self.file, text.encode())

    def exit_code(self) -> int:
        """Reads the rest of the output, and waits for the end."""
        with suppress(OSError):
            while self.read(time.monotonic() + 60):
                pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        """Ends the program if it has not ended."""
        with suppress(OSError):
            os.close(self.file)
        with suppress(OSError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@pytest.fixture(scope="module")
def made(sample, tmp_path_factory):
    """Small models, a reward head and a checkpoint that was trained with it."""
    out = tmp_path_factory.mktemp("made")
    encoder, policy = (small_model(kind, out / kind, sample) for kind in ("bart", "llama"))
    head = write_head(out / HEADS, encoder)
    weights = write_checkpoint(out, policy, head)
    return SimpleNamespace(out=out, encoder=encoder, policy=policy, head=head, weights=weights)


def pipe(lines, *arguments, check: int = 0):
    """Runs the tool with lines as its input."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return call_script(TOOL, *arguments, check=check)


# ---------------------------------------------------------------------------------------------------------------------
# In a terminal


@pytest.fixture
def terminal():
    sessions = []

    def start(*command) -> TerminalSession:
        sessions.append(TerminalSession(sys.executable, *command))
        return sessions[-1]

    yield start
    for session in sessions:
        session.close()


@pytest.mark.slow
def test_a_session_with_all_commands_wide_characters_and_two_thousand_turns(terminal, made, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(WITH_HISTORY)
    saved, talks = tmp_path / "saved.json", tmp_path / "talks"
    options = ("--weights", made.weights, "--compare", "--collect", talks, "--user", "ann", "--seed", 1)
    session = terminal(driver, *options)
    session.wait_for("Do you agree? [yes/no]")
    session.type("yes\r")
    session.wait_for("It will be stored.")
    session.type("日本語 🙂 <b>x</b>\x1b[D\x1b[D\x1b[D\x1b[Dé\r")  # with four steps to the left
    session.wait_for("    reward ", 2)
    session.type("/retry\r")
    session.wait_for("    reward ", 4)
    session.type("/undo\r")
    session.wait_for("Taken back: 日本語 🙂 <b>xé</b>")
    session.type("Once more, please\r")
    session.wait_for("    reward ", 6)
    said = {
        "/nope": "! unknown command /nope", "/help": "Ctrl-C and Ctrl-D leave.", "/smile": "Noted: happiness",
        "/frown": "Noted: sadness", "/reward": "1,001 rewards by reward1_default:",
        "/rate 12": "a number from 1 to 9 is expected", "/rate": "How much did you enjoy",
        "8": "Noted: how_enjoyable 8", "/rate i_like_you 3": "Noted: i_like_you 3",
        f"/save {saved}": f"Written: {saved}", "/new": "A new conversation.",
    }  # fmt: skip
    for line, answer in said.items():
        session.type(f"{line}\r")
        session.wait_for(answer)
    session.type("Hello\r")
    session.wait_for("    reward ", 8)
    session.type("\x03")  # Ctrl-C
    session.wait_for("1 finished, 1 broken off")
    assert session.exit_code() == 0 and "Traceback" not in session.output
    assert session.output.count("AI: ") == session.output.count("Base: ") == 4
    assert session.output.count(" reply 0\n") == 1  # the bars of all replies
    record = json.loads(saved.read_text())
    texts = [turn["text"] for turn in record["turns"]]
    assert len(texts) == 2002 and texts[2000] == "Once more, please" and record["turns"][2001]["reaction"] == "sadness"
    assert record["answers"] == {"how_enjoyable": 8, "i_like_you": 3} and len(record["rewards"]) == 1001
    (broken_off,) = (talks / ".broken_off").iterdir()
    rows = (broken_off / "transcription" / "transcript_cliffhanger.csv").read_text().splitlines()
    assert len(rows) == 1 + 2002 and ",ann," in rows[2001] and ",Hello," in rows[2001]


# ---------------------------------------------------------------------------------------------------------------------
# Through pipes


def test_a_model_without_a_head_is_talked_to_and_the_end_of_input_leaves(made):
    done, again = (pipe(["Hello 👋 你好", "/reward"], "--weights", made.policy, "--seed", 0) for _ in range(2))
    assert done.stdout.count("AI: ") == 1 and "No rewards: no head is recorded beside" in done.stdout
    assert "! there is no reward head" in done.stdout and done.stderr == ""
    assert again.stdout == done.stdout


def test_a_head_that_is_gone_is_named_and_another_can_be_given(made, tmp_path):
    weights = write_checkpoint(tmp_path, made.policy, tmp_path / "gone" / "reward1_x")
    done = pipe(["Hello"], "--weights", weights)
    assert f"was trained with {tmp_path}/gone/reward1_x, which is not there; name it" in done.stdout
    named = pipe(["Hello", "/reward"], "--weights", weights, "--reward_path", "default", "--output_dir", made.out)
    assert "1 rewards by reward1_default" in named.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: --weights"),
        ("--weights x --user a,b", "at most 64 letters, digits and . @ + - _ are expected"),
        ("--weights x --reward_class you_are_tall", "invalid choice: 'you_are_tall'"),
        ("--weights x --context_turns 0", "a whole number of at least 1 is expected, not '0'"),
        ("--weights no/such/folder", "--weights no/such/folder: expected a model's folder, found none"),
        ("--weights {policy} --compare", "has no adapter, so there is no base policy beside it"),
        ("--weights {policy} --prompt_format chat", "has no chat template; use raw"),
        ("--weights {policy} --reward_path nobody", "nobody: expected a run name or the path of a reward1_ file"),
        ("--weights {policy} --collect {policy}/config.json", "File exists"),
        ("--weights x --port 80", "--port is for the page: add --web"),
        ("--weights x --camera", "--camera is for the page: add --web"),
        ("--weights x --questions i_like_you", "--questions is for the page: add --web"),
        ("--weights x --web --people 0", "a whole number of at least 1 is expected, not '0'"),
        ("--weights x --web --camera", "faces are for training data, so name a folder with --collect"),
        ("--weights x --web --face_model fer", "--face_model is for the camera: add --camera"),
        ("--weights x --web --port 70000", "--port 70000: bind(): port must be 0-65535.; name another"),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments, message, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = pipe([], *arguments.format(policy=made.policy).split(), check=2).stderr
    assert message in error and error.count("\n") == 1


def test_a_page_without_gradio_is_answered_in_one_line(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    error = pipe([], "--weights", made.policy, "--web", "--port", 0, check=2).stderr
    assert "--web needs a Python package that is missing" in error
    assert "pip install -r apps/chat/requirements.txt" in error


# ---------------------------------------------------------------------------------------------------------------------
# Collected, trained on, forgotten

WORDS = ("the rain", "my old piano", "fresh bread", "the river", "that new film", "a long walk", "my garden")


def message(number: int, turn: int) -> str:
    return f"I wanted to tell you about {WORDS[(number + turn) % 7]}, do you like it?"


def talk_on_the_page(weights, talks) -> None:
    """Two times two conversations of bob, side by side, and two that are broken off: what the page does, by script."""
    AcceleratorState._reset_state(reset_partial_state=True)
    options = chat.parse_options(["--weights", str(weights), "--compare", "--device", "cpu"])
    partner, scorer = chat.load(options)
    sessions = Sessions(partial(Talk, partner, scorer), True, Collection(talks), people=1, user="bob", seed=2)
    session = sessions.open("window", camera=True)
    session.consent(True)
    for number in range(2):
        for turn in range(4):
            session.say(message(number, turn))
            for _ in session.reply():
                session.see([0, 0, 0, 0.9, 0, 0.1, 0, 0], "fer")
            session.react(turn % 2, "sadness")
        session.finish()
        session.rate([{"overall_affect": str(7 + number)}, {"overall_affect": "2"}], agreed=True)
        session.begin()
    session.say("This one is not finished")
    sessions.close()


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """Ten conversations of two people, collected by scripts in the terminal and as the page does it, and the three
    commands' runs on them."""
    folder = tmp_path_factory.mktemp("collected")
    talks, runs = folder / "talks", folder / "runs"
    lines = ["yes"]
    for number in range(6):
        for turn in range(4):
            lines.append(message(number, turn))
            lines += ["/smile"] if (number + turn) % 3 == 0 else []
        lines += [f"/rate {1 + number}", "/new"]
    lines += ["This one is not finished"]
    pipe(
        lines, "--weights", made.weights, "--collect", talks, "--user", "ann", "--seed", 1,
        "--reward_class", "overall_affect",
    )  # fmt: skip
    talk_on_the_page(made.weights, talks)
    common = ("--data_dir", talks, "--output_dir", runs, "--context_turns", 2, "--device", "cpu")
    reward = (*common, "--small_model_shrink", "--epochs", 1, "--batch_size", 8, "--val")
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        without_pictures(patch)
        li = ("--lang_model_path", made.encoder, "--run_name", "li", "--learning_rate", 1e-3)
        printed["li"] = call_script("train_reward_LI_only.py", *reward, *li).stdout
        geli = ("--train", "--affect_path", "li", "--run_name", "geli")
        printed["geli"] = call_script("train_reward_GELI.py", *reward, *geli).stdout
        rl = ("--model_name", made.policy, "--train", "--val", "--generate", "--steps", 1, "--batch_size", 2)
        printed["rl"] = call_script("train_rl_GELI.py", *common, *rl, "--val_prompts", 4).stdout
    return SimpleNamespace(talks=talks, runs=runs, printed=printed)


@pytest.mark.slow
def test_the_three_commands_train_on_ten_collected_conversations(trained, made):
    for printed in trained.printed.values():
        assert "Read 10 conversations, 10 trajectories" in printed  # nothing of those that were broken off
        assert "Dropped 10 trajectories: the user has no survey row." in printed and "conversations:" not in printed
    assert "training: 9 conversations" in trained.printed["geli"]
    record = json.loads(next(trained.runs.glob("SINGLE*/reward1_li.json")).read_text())
    assert len(record["training_conversations"]) == 9
    assert (trained.runs / "rlmf_weights" / f"GELI_{made.policy.name}_1" / "adapter_model.safetensors").is_file()
    table = next(trained.runs.glob("visual*/val_turn_rewards_geli.csv")).read_text()
    assert "policy:GELI_llama_2" in table


def test_what_was_trained_can_be_talked_to(trained, made):
    weights = trained.runs / "rlmf_weights" / f"GELI_{made.policy.name}_1"
    done = pipe(["Hello", "/reward", "/quit"], "--weights", weights, "--compare")
    assert "1 rewards by reward1_geli:" in done.stdout and "Base: " in done.stdout


def test_a_person_is_forgotten(trained, monkeypatch):
    def forget(*more, answer: str = "", check: int = 0):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        return call_script(FORGET, "ann", "--data_dir", trained.talks, "--output_dir", trained.runs, *more, check=check)

    before = sorted(trained.talks.rglob("*"))
    gone = {path.parent for path in trained.talks.rglob("survey.csv") if "ann" in path.read_text()}
    refused = forget(answer="y\n", check=2)
    assert (
        "nothing was removed: expected the answer yes" in refused.stderr and sorted(trained.talks.rglob("*")) == before
    )
    done = forget(answer="yes\n").stdout
    assert done.count(" conversation ") == 7 and "Removed 7 conversations" in done  # one was broken off
    for named in ("reward1_li", "reward1_geli", "GELI_llama.json", "GELI_llama_responses.csv"):
        assert re.search(rf"{re.escape(named)} ", done), named
    (validated,) = json.loads(next(trained.runs.glob("SINGLE*/reward1_li.json")).read_text())[
        "validation_conversations"
    ]
    assert ("val_turn_rewards_geli.csv " in done) == (trained.talks / validated in gone)
    assert not [path for path in trained.talks.rglob("survey.csv") if "ann" in path.read_text()]
    assert len(list(trained.talks.rglob("survey.csv"))) == 6  # bob's
    assert not list((trained.runs / "cache").rglob("*.cache")) and not (trained.runs / "cache" / "features").exists()
    assert "ann: expected an id that speaks in a conversation" in forget("--yes", check=2).stderr
