"""`python -m apps.judge`: blinded sheets there and back, and a judge against a small server that misbehaves."""

import csv
import json
import re
import signal
import subprocess
import time
from collections import Counter
from contextlib import contextmanager

import pandas as pd
import pytest
from conftest import call_script, environment_of_its_own, program
from judged_responses import fill, write_responses

from apps import openai_server
from apps.judge import server as judge_server
from apps.judge.pairs import CRITERIA
from apps.judge.sheets import Key, sheet_csv
from experiments.llm_oracle import server

TOOL = "apps.judge"
SECRET = "sk-test-0123456789"
TIMEOUT = 1.0  # seconds, of the judge


# ---------------------------------------------------------------------------------------------------------------------
# Sheets

# criterion -> (wins, ties, losses) of the tuned policy on 40 prompts that are planted
PLANTED = dict.fromkeys(CRITERIA, (20, 0, 20)) | {
    "emotional connection": (34, 2, 4),
    "positivity": (10, 20, 10),
    "social understanding": (4, 0, 36),
    "fluent": (0, 40, 0),
}


def planted_vote(row: int, criterion: str) -> int:
    """A vote, so that all rows together have the planted counts."""
    wins, ties, _ = PLANTED[criterion]
    return 1 if row < wins else 0 if row < wins + ties else -1


@pytest.fixture
def made(tmp_path):
    """(folder of `make`, its key, rater -> empty rows)."""
    responses = write_responses(tmp_path / "GELI_llama_responses.csv", 40)
    printed = call_script(TOOL, "make", responses, tmp_path / "out", "--prompts", 40).stdout
    assert "tuned against base: 40 prompts, 3 raters" in printed and "key.json" in printed
    sheets = {}
    for path in sorted((tmp_path / "out" / "sheets").glob("*.csv")):
        with open(path, encoding="utf-8-sig", newline="") as file:
            sheets[path.stem] = list(csv.DictReader(file))
    return tmp_path / "out", Key.read(tmp_path / "out" / "key.json"), sheets


def test_planted_preferences_come_back_from_blinded_sheets(made):
    out, key, sheets = made
    assert list(sheets) == ["rater_1", "rater_2", "rater_3"]
    paths = [out / f"{rater}_filled.csv" for rater in sheets]
    for path, rows in zip(paths, sheets.values(), strict=True):
        path.write_text(sheet_csv(fill(rows, key, planted_vote)), encoding="utf-8", newline="")
    printed = call_script(TOOL, "score", out / "key.json", *paths).stdout
    table = pd.read_csv(out / "human_eval.csv").set_index("criterion")
    assert list(table.index) == list(CRITERIA) and (table["votes"] == 120).all()
    for criterion, counts in PLANTED.items():
        assert table.loc[criterion, ["win", "tie", "loss"]].tolist() == [count / 40 for count in counts]
    significant = table.index[table["p_holm"] < 0.05].tolist()
    assert significant == ["emotional connection", "social understanding"]
    assert table.loc["fluent", "p"] == 1 and pd.isna(table.loc["fluent", "alpha"])
    assert (table["alpha"].drop("fluent") == 1).all()  # the raters agree
    low, high = table.loc["emotional connection", ["win_low", "win_high"]]
    assert low == pytest.approx(0.85 - 0.11, abs=0.02) and high == pytest.approx(0.85 + 0.11, abs=0.02)
    assert "tuned against base, 40 prompts, 3 of 3 raters" in printed and "Left out" not in printed


def test_bad_sheets_are_named_and_the_others_count(made):
    out, key, sheets = made
    filled = [fill(rows, key, planted_vote) for rows in sheets.values()]
    filled[0][5]["B"] = "something else"
    filled[1][0]["fluent"] = ""
    paths = [out / f"{n}.csv" for n in range(2)]
    for path, rows in zip(paths, filled[:2], strict=True):
        path.write_text(sheet_csv(rows), encoding="utf-8", newline="")
    printed = call_script(TOOL, "score", out / "key.json", *paths).stdout
    assert f"Left out: {paths[0]}: 1 items are changed" in printed and "1 of 3 raters" in printed
    assert re.search(rf"rater_2 +{re.escape(str(paths[1]))} +0\.9969 +1 +0", printed)
    refused = call_script(TOOL, "score", out / "key.json", paths[0], check=2)
    assert "no sheet counts" in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("make r.csv out --prompts 9", "expected at least 9 prompts, found 4; give --prompts 4"),
        ("make r.csv out --compare tuned ppo --prompts 4", "among them 'ppo'"),
        ("make r.csv . --prompts 4", "expected a new or empty folder"),
        ("make r.csv out --raters 0", "a whole number of at least 1 is expected, not '0'"),
        ("score r.csv r.csv", "expected the key.json that `make` wrote"),
        ("judge r.csv --judge_url http://h/v1 --judge_model m", "would be sent to http://h/v1: give --log_text if"),
        ("judge r.csv --judge_url h/v1 --judge_model m --log_text", "an address such as https://host/v1"),
        ("judge r.csv --judge_url http://u:p@h/v1 --judge_model m --log_text", "an address such as https://host/v1"),
        ("judge r.csv --judge_url http://h:70000/v1 --judge_model m", "an address such as https://host/v1"),
        ("", "the following arguments are required: COMMAND"),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments, message, tmp_path, monkeypatch):
    write_responses(tmp_path / "r.csv", 4)
    monkeypatch.chdir(tmp_path)
    error = call_script(TOOL, *arguments.split(), check=2).stderr
    assert message in error and error.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# The judge

LETTERS = {str(number): "A" for number in range(1, 9)}


def verdict(text: str) -> str:
    """The side of the tuned policy's response, whichever it is."""
    return "A" if text.index("after, ") < text.index("before, ") else "B"


def well(text: str) -> str:
    return json.dumps(dict.fromkeys(LETTERS, verdict(text)))


# number of a prompt -> how the server answers questions about it; a number is an HTTP status
BEHAVIOR = {
    0: well,
    1: lambda text: f"Sure!\n```json\n{well(text)}\n```",
    2: lambda text: "\n".join(f"{number}: {verdict(text)}" for number in LETTERS),
    3: lambda _: json.dumps(LETTERS),  # always the left response
    4: lambda _: "Both responses are lovely, and I would not like to choose.",
    5: "late once",
    6: "late",
    7: 503,
    8: "busy once",
}


@contextmanager
def judging_server(behavior: dict, seconds: float = 0.0):
    """A server that takes some seconds for an answer. Yields its address and the list of requests that it got."""
    texts = set()

    def answer(text: str) -> str | int:
        kind, first = behavior[prompt_of(text)], text not in texts
        texts.add(text)
        if kind == "busy once":
            return 429 if first else well(text)
        if str(kind).startswith("late"):
            time.sleep(3 * TIMEOUT if first or kind == "late" else 0)
            return well(text)
        return kind if isinstance(kind, int) else kind(text)

    with server(answer, seconds) as (url, asked):
        yield url, asked


def prompt_of(text: str) -> int:
    return int(re.search(r"<b>(\d+)</b>", text)[1])


def texts_of(asked: list[dict]) -> list[str]:
    return [body["messages"][0]["content"] for body in asked]


@pytest.fixture
def judge_at_work(monkeypatch):
    """`judging_server`, which is asked with an API key and without long waits."""
    pytest.importorskip("openai", reason="needs openai (apps/judge/requirements.txt)")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(openai_server, "RETRIES", 2)
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)
    return judging_server


def arguments(folder, url, prompts=9, **more):
    responses = folder / "GELI_llama_responses.csv"
    if not responses.exists():
        write_responses(responses, prompts)
    options = {"judge_url": url, "judge_model": "judges/small", "prompts": prompts, "timeout": TIMEOUT, **more}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return (TOOL, "judge", responses, *words, "--log_text")


@pytest.mark.slow
def test_whatever_the_server_does_nothing_is_lost_and_each_is_counted(tmp_path, judge_at_work):
    with judge_at_work(BEHAVIOR) as (url, asked):
        said = call_script(*arguments(tmp_path, url))
        first = list(asked)
        again = call_script(*arguments(tmp_path, url)).stdout
        later = asked[len(first) :]
    assert re.search(
        r"Sends 9 prompts and their responses in 18 requests \([\d,]+ characters\) to " + url[:-3], said.stdout
    )
    assert re.search("18 requests: 12 answered, 2 unparsed, (2 timeout, 2 HTTP 503|2 HTTP 503, 2 timeout)", said.stdout)
    # who was asked how often, in both orders: what cannot be parsed once more, failures three times
    assert Counter(map(prompt_of, texts_of(first))) == {0: 2, 1: 2, 2: 2, 3: 2, 4: 4, 5: 4, 6: 6, 7: 6, 8: 4}
    # a second run asks what has failed, and nothing else
    assert set(map(prompt_of, texts_of(later))) == {6, 7} and "14 requests are answered in" in again
    table = pd.read_csv(tmp_path / "GELI_llama_responses_judge_judges-small.csv").set_index("criterion")
    assert (table["votes"] == 6).all()  # prompts 0, 1, 2, 3, 5, 8
    assert table["win"].tolist() == pytest.approx([5 / 6] * 8, abs=1e-5)  # prompt 3 is a tie that flipped
    assert table["flipped"].tolist() == table["tie"].tolist() == pytest.approx([1 / 6] * 8, abs=1e-5)
    assert table["p"].tolist() == pytest.approx([2 / 2**5] * 8)


def test_what_is_sent_is_both_orders_and_the_key_stays_secret(tmp_path, judge_at_work):
    with judge_at_work(dict.fromkeys(range(3), well)) as (url, asked):
        said = call_script(*arguments(tmp_path, url, prompts=3, concurrency=1))
    sides = [(prompt_of(text), verdict(text)) for text in texts_of(asked)]
    assert sorted(sides) == [(number, side) for number in range(3) for side in "AB"]
    files = [path for path in tmp_path.iterdir() if path.suffix in (".jsonl", ".csv")]
    assert len(files) == 3 and not any(SECRET in path.read_text() for path in files)
    assert SECRET not in said.stdout + said.stderr
    log = next(path for path in files if path.suffix == ".jsonl")
    assert log.stat().st_mode & 0o077 == 0


def test_too_few_answers_for_a_table_are_an_error(tmp_path, judge_at_work):
    with judge_at_work({0: BEHAVIOR[4]}) as (url, _):
        stopped = call_script(*arguments(tmp_path, url, prompts=1), check=2)
    assert "no prompt has answers in both orders" in stopped.stderr
    assert "2 requests: 0 answered, 2 unparsed" in stopped.stdout


@pytest.mark.slow
def test_a_killed_run_continues_without_asking_again(tmp_path, judge_at_work):
    with judge_at_work(dict.fromkeys(range(9), well), seconds=0.2) as (url, asked):
        words = [str(word) for word in arguments(tmp_path, url, concurrency=2, timeout=20)]
        log = tmp_path / "GELI_llama_responses_judge_judges-small.jsonl"
        command = [*program(words[0]), *words[1:]]
        started = subprocess.Popen(command, env=environment_of_its_own(), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (log.exists() and log.read_text().count("answers") >= 6):
            time.sleep(0.02)
        started.send_signal(signal.SIGKILL)
        started.wait()
        kept = len(judge_server.read_answers(log))
        assert 6 <= kept < 18
        log.write_bytes(log.read_bytes() + b'\n{"key": "torn')
        before = len(asked)
        said = call_script(*words).stdout
        assert len(asked) - before == 18 - kept and f"{kept} requests are answered in" in said
        assert "18 requests: 18 answered, 0 unparsed" in said
