"""`python -m apps.judge`: blinded sheets there and back, and a judge against a small server that misbehaves."""

import csv
import json
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
from conftest import call_script, environment_of_its_own, program
from judged_responses import fill, write_responses

from apps import openai_server as chat_server
from apps.judge import server as judge_server
from apps.judge.pairs import CRITERIA
from apps.judge.sheets import Key, sheet_csv

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
        ("score r.csv r.csv", "expected the key.json that human_eval.py make wrote"),
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
    9: "hangs up",
}


@contextmanager
def judge_at_work(behavior: dict, seconds: float = 0.0):
    """A small OpenAI-compatible server. Yields its address and the list of (prompt, body, headers) that it was asked.

    Args:
        seconds: that it takes for an answer.
    """
    asked, finished = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][0]["content"]
            number = int(re.search(r"<b>(\d+)</b>", text)[1])
            first = text not in [other["messages"][0]["content"] for _, other, _ in asked]
            asked.append((number, body, dict(self.headers)))
            finished.wait(seconds)
            answer = behavior[number]
            if answer == "hangs up":
                return self.connection.close()
            if str(answer).startswith("late"):
                finished.wait(3 * TIMEOUT if first or answer == "late" else 0)
                answer = well
            elif answer == "busy once":
                answer = 429 if first else well
            status, content = (answer, f"error {answer} of {SECRET}\nmore") if isinstance(answer, int) else (200, "")
            if status == 200:
                reply = {"role": "assistant", "content": answer(text)}
                content = json.dumps({"choices": [{"message": reply}]})
            self.send_response(status)
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *_):
            pass

        def handle(self):
            with suppress(OSError):  # the other side has hung up
                super().handle()

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            pass

    running = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", asked
    finally:
        finished.set()
        running.shutdown()
        running.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(chat_server, "BACKOFF", 0.01)
    monkeypatch.setattr(chat_server, "RETRIES", 2)
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)


def arguments(folder, url, prompts=10, **more):
    responses = folder / "GELI_llama_responses.csv"
    if not responses.exists():
        write_responses(responses, prompts)
    options = {"judge_url": url, "judge_model": "judges/small", "prompts": prompts, "timeout": TIMEOUT, **more}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return (TOOL, "judge", responses, *words, "--log_text")


def test_whatever_the_server_does_nothing_is_lost_and_each_is_counted(tmp_path):
    with judge_at_work(BEHAVIOR) as (url, asked):
        said = call_script(*arguments(tmp_path, url))
        first = list(asked)
        again = call_script(*arguments(tmp_path, url)).stdout
        later = asked[len(first) :]
    assert re.search(
        r"Sends 10 prompts and their responses in 20 requests \([\d,]+ characters\) to " + url[:-3], said.stdout
    )
    assert "20 requests: 12 answered, 2 unparsed, 2 timeout, 2 HTTP 503, 2 no connection" in one_order(said.stdout)
    # who was asked how often, in both orders: what cannot be parsed once more, failures three times
    assert Counter(number for number, *_ in first) == {0: 2, 1: 2, 2: 2, 3: 2, 4: 4, 5: 4, 6: 6, 7: 6, 8: 4, 9: 6}
    # a second run asks what has failed, and nothing else
    assert {number for number, *_ in later} == {6, 7, 9} and "14 requests are answered in" in again
    table = pd.read_csv(tmp_path / "GELI_llama_responses_judge_judges-small.csv").set_index("criterion")
    assert (table["votes"] == 6).all()  # prompts 0, 1, 2, 3, 5, 8
    assert table["win"].tolist() == pytest.approx([5 / 6] * 8, abs=1e-5)  # prompt 3 is a tie that flipped
    assert table["flipped"].tolist() == table["tie"].tolist() == pytest.approx([1 / 6] * 8, abs=1e-5)
    assert table["p"].tolist() == pytest.approx([2 / 2**5] * 8)


def one_order(printed: str) -> str:
    """What is printed, with the counts of failures in the order of this test."""
    line = re.search(r"\d+ requests: .*", printed)[0]
    head, *counts = re.split(r", |: ", line)
    kinds = ["answered", "unparsed", "timeout", "HTTP 503", "no connection"]
    return f"{head}: {', '.join(sorted(counts, key=lambda count: kinds.index(count.partition(' ')[2])))}"


def test_what_is_sent_is_both_orders_without_chance_and_the_key_stays_secret(tmp_path):
    with judge_at_work(dict.fromkeys(range(3), well)) as (url, asked):
        said = call_script(*arguments(tmp_path, url, prompts=3, concurrency=1))
    assert all(headers["Authorization"] == f"Bearer {SECRET}" for *_, headers in asked)
    assert all((body["temperature"], body["seed"], body["model"]) == (0, 0, "judges/small") for _, body, _ in asked)
    sides = [(number, verdict(body["messages"][0]["content"])) for number, body, _ in asked]
    assert sorted(sides) == [(number, side) for number in range(3) for side in "AB"]
    files = [path for path in tmp_path.iterdir() if path.suffix in (".jsonl", ".csv")]
    assert len(files) == 3 and not any(SECRET in path.read_text() for path in files)
    assert SECRET not in said.stdout + said.stderr
    log = next(path for path in files if path.suffix == ".jsonl")
    assert log.stat().st_mode & 0o077 == 0


def test_a_refusal_stops_at_once_and_shows_the_servers_first_line(tmp_path):
    with judge_at_work(dict.fromkeys(range(30), 401)) as (url, asked):
        stopped = call_script(*arguments(tmp_path, url, prompts=30, concurrency=2), check=2)
    assert stopped.stderr.endswith(f"{url[:-3]}: HTTP 401: error 401 of …\n") and len(asked) < 10
    with judge_at_work(dict.fromkeys(range(30), 400)) as (url, _), pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_server, "API_KEY", "ANOTHER_VARIABLE")  # without a key
        assert "HTTP 400: error 400 of" in call_script(*arguments(tmp_path, url, prompts=30), check=2).stderr


def test_a_server_that_is_down_is_noticed_soon(tmp_path):
    with judge_at_work({}) as (url, _):
        pass
    stopped = call_script(*arguments(tmp_path, url, prompts=40), check=2)
    assert "10 requests in a row failed (no connection)" in stopped.stderr


def test_too_few_answers_for_a_table_are_an_error(tmp_path):
    with judge_at_work({0: BEHAVIOR[4]}) as (url, _):
        stopped = call_script(*arguments(tmp_path, url, prompts=1), check=2)
    assert "no prompt has answers in both orders" in stopped.stderr
    assert "2 requests: 0 answered, 2 unparsed" in stopped.stdout


def test_a_killed_run_continues_without_asking_again(tmp_path):
    with judge_at_work(dict.fromkeys(range(10), well), seconds=0.2) as (url, asked):
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
        assert 6 <= kept < 20
        log.write_bytes(log.read_bytes() + b'\n{"key": "torn')
        before = len(asked)
        said = call_script(*words).stdout
        assert len(asked) - before == 20 - kept and f"{kept} requests are answered in" in said
        assert "20 requests: 20 answered, 0 unparsed" in said
