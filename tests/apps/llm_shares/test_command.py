"""`python -m apps.llm_shares` against a small server that knows the truth and misbehaves; stage 2 on its shares."""

import json
import re
import signal
import subprocess
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
from conftest import call_script, environment_of_its_own, program
from no_pictures import without_pictures

from apps.openai_server import ReplyFile
from experiments.llm_oracle import oracle, server
from geli.heads import load_reward_head
from tools.hidden_reward import hidden_reward

TOOL = "apps.llm_shares"
OPENAI = "needs openai (apps/llm_shares/requirements.txt)"
QUICK = ("--train", "--val", "--context_turns", 2, "--epochs", 1, "--train_size", 6, "--small_model_shrink")


def arguments(corpus, out, url, *more):
    return (TOOL, corpus, out, "--url", url, "--model", "oracle", "--train_size", 6, "--log_text", *more)


def table(path):
    return pd.read_csv(path / "shares.csv", dtype={"turn_id": str})


@pytest.fixture(scope="module")
def shares(sample, tmp_path_factory):
    """Folder with the shares of an oracle that is right, but spoils half of its replies."""
    pytest.importorskip("openai", reason=OPENAI)
    out = tmp_path_factory.mktemp("shares")
    with server(partial(oracle, noise=0, faults=0.5)) as (url, asked):
        said = call_script(*arguments(sample, out, url, "--price", 1, 2)).stdout
        assert f"to {url[:-3]}\n" in said and re.search(r"Sends 6 conversations in 12 requests \([\d,]+ char", said)
        assert re.search(
            r"Estimate: about 12 requests, [\d,]+ tokens in, \d+ out, \$0\.\d\d; at most 24 requests", said
        )
        assert re.search(r"After one: about 11 requests.* seconds", said)
        first = len(asked)
        again = call_script(*arguments(sample, out, url)).stdout
        assert len(asked) == first and "12 of 12 are answered in" in again
    return out


def test_an_oracles_shares_follow_the_truth_and_sum_to_the_scores(shares, sample):
    rows = table(shares)
    texts = pd.concat(
        pd.read_csv(path, dtype={"turn_id": str}).assign(conversation_id=path.parents[1].name)
        for path in sample.glob("*/transcription/transcript_cliffhanger.csv")
    )
    rows = rows.merge(texts[["conversation_id", "turn_id", "speaker", "utterance"]], on=["conversation_id", "turn_id"])
    assert len(rows) == len(table(shares)) and rows.groupby("conversation_id")["flip"].nunique().eq(2).sum() == 6
    answers = {
        (path.parent.name, user): 10 * answer
        for path in sample.glob("*/survey.csv")
        for user, answer in pd.read_csv(path).set_index("user_id")["overall_affect"].items()
    }
    for (name, _), of in rows.groupby(["conversation_id", "flip"]):
        rater = next(user for c, user in answers if c == name and user != of["speaker"].iloc[0])
        assert of["share"].sum() == pytest.approx(answers[name, rater], abs=1e-3)
        right = (of["status"] == "answered").all()
        truth = np.array([5 * hidden_reward(text) for text in of["utterance"]])
        # a share is a number of points of 10, times 10 / T
        if right:
            differences = (of["share"] - of["share"].mean()) * len(of) / 10
            assert differences.tolist() == pytest.approx((truth - truth.mean()).tolist(), abs=0.11)
    assert (rows["tokens"] > 0).all() and rows["seconds"].sum() > 0
    results = {row["what"]: row["number"] for row in json.loads((shares / "shares.json").read_text())["results"]}
    assert 0 < results["replies with a number from 0 to 10 for each turn"] < 12
    assert results["turns answered"] == (rows["status"] == "answered").sum()


@pytest.mark.slow
def test_stage_2_learns_from_the_shares(shares, sample, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    without_pictures(monkeypatch)
    path = shares / "shares.csv"
    data = ("--data_dir", sample, "--output_dir", tmp_path, "--lang_model_path", tiny / "bart", *QUICK)
    llm = ("train_reward_GELI.py", *data, "--redist_type", "LLM")
    said = call_script(*llm, "--llm_shares", path, "--run_name", "llm").stdout
    head = next(tmp_path.glob("baselines_*_LLM_K_160/reward1_llm"))
    assert load_reward_head(head).config.redist_type == "LLM" and "Stage 2 (GE, LLM)" in said
    assert "training: 6 conversations, 12 trajectories" in said

    # shares of other turns make another head; without those of a trajectory it is dropped, counted and named
    rows = table(shares)
    rows["share"] = rows["share"].to_numpy()[::-1]
    kept = rows[~((rows["conversation_id"] == rows["conversation_id"].iloc[0]) & (rows["flip"] == 1))]
    kept.to_csv(tmp_path / "other.csv", index=False)
    said = call_script(*llm, "--llm_shares", tmp_path / "other.csv", "--run_name", "other").stdout
    assert "Dropped 1 trajectories: no shares in the file of --llm_shares." in said
    assert "training: 6 conversations, 11 trajectories" in said
    record = json.loads(head.with_name("reward1_other.json").read_text())
    assert record["dropped_trajectories"] == {
        f"{rows['conversation_id'].iloc[0]}/1": "no shares in the file of --llm_shares"
    }
    weights = [load_reward_head(head.with_name(f"reward1_{run}")).layers[0].weight for run in ("llm", "other")]
    assert not (weights[0] == weights[1]).all()

    rows.assign(data="of another text").to_csv(tmp_path / "changed.csv", index=False)
    refused = call_script(*llm, "--llm_shares", tmp_path / "changed.csv", check=2).stderr
    assert "found none to use: has changed since its shares were made" in refused and refused.count("\n") == 1
    assert "give --llm_shares" in call_script(*llm, check=2).stderr
    wrong = call_script("train_reward_GELI.py", *data, "--llm_shares", path, check=2).stderr
    assert "--llm_shares: is for --redist_type LLM" in wrong


@pytest.mark.slow
def test_a_killed_run_continues_without_a_repeated_request(sample, tmp_path):
    pytest.importorskip("openai", reason=OPENAI)
    with server(partial(oracle, noise=1, faults=0.3), seconds=0.2) as (url, asked):
        words = [str(word) for word in arguments(sample, tmp_path / "out", url, "--concurrency", 1)]
        log = tmp_path / "out" / "replies.jsonl"
        command = [*program(words[0]), *words[1:]]
        started = subprocess.Popen(command, env=environment_of_its_own(), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (log.exists() and log.read_text().count('"key"') >= 4):
            time.sleep(0.02)
        started.send_signal(signal.SIGKILL)
        started.wait()
        kept, before = len(ReplyFile(log).records), len(asked)
        assert 4 <= kept < 12 and log.stat().st_mode & 0o077 == 0
        call_script(*words)
        texts = [body["messages"][0]["content"] for body in asked]
        in_flight = texts[kept:before]  # when it was killed: sent, but without a reply on disk
        assert len(in_flight) <= 1 and len(texts) - len(set(texts)) == len(in_flight)
        call_script(*arguments(sample, tmp_path / "whole", url))
    assert table(tmp_path / "out")["share"].tolist() == table(tmp_path / "whole")["share"].tolist()


def test_a_model_on_this_machine_is_asked_without_leave_and_says_the_same_twice(sample, tiny, tmp_path):
    model = (sample, tmp_path / "one", "--folder", tiny / "llama", "--train_size", 2, "--device", "cpu", "--window", 2)
    said = call_script(TOOL, *model, "--overlap", 1).stdout
    assert re.search(r"Reads 2 conversations in \d+ requests", said) and "Sends" not in said
    call_script(TOOL, model[0], tmp_path / "two", *model[2:], "--overlap", 1, "--li_text")
    first, second = (table(tmp_path / name) for name in ("one", "two"))
    assert (first["status"] == "answered").all() and len(first) == len(second) > 20
    assert not np.allclose(first["share"], second["share"])  # faces in words are another request
    (tmp_path / "one" / "replies.jsonl").unlink()
    call_script(TOOL, *model, "--overlap", 1)
    assert table(tmp_path / "one")["share"].tolist() == first["share"].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("data out", "who is asked? give --url and --model of a server, or --folder"),
        ("data out --folder m --url http://h/v1 --model m", "who is asked?"),
        ("data out --url http://h/v1 --log_text", "--url and --model go together"),
        ("data out --folder m --model m", "--url and --model go together"),
        ("data out --url http://h/v1 --model m", "would be sent to http://h/v1: give --log_text if they may"),
        ("data out --folder m --window 4 --overlap 4", "--overlap 4: fewer turns than those of --window (4)"),
        ("data out --folder m --price 1 -2", "a number of at least 0 is expected, not '-2'"),
        ("data out --url h/v1 --model m", "an address such as https://host/v1"),
        ("{sample} out --folder nowhere", "--folder nowhere: this hub id (and no folder of that name is here)"),
        ("nowhere out --folder m", "--data_dir nowhere: no such file or directory"),
    ],
)
def test_mistakes_are_answered_in_one_line(options, message, sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = call_script(TOOL, *options.format(sample=sample).split(), check=2).stderr
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
