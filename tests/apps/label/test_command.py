"""`python -m apps.label`: the rewards of training for every turn, of CANDOR's folders and of chats."""

import gzip
import json
import shutil
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
from cases import case
from conftest import call_script, small_model
from small_models import write_head

from apps.label import labelling
from data_utils import TurnSet, read_corpus
from geli.heads import load_encoder_of_head, load_reward_head
from models import head_rewards

TOOL = "apps.label"
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi,\nhow \"are\" you, 日本語?"},
    {"role": "user", "content": "Fine"},
    {"role": "assistant", "content": "Good."},
]  # fmt: skip


@pytest.fixture(scope="module")
def encoder(sample, tmp_path_factory):
    return small_model("bart", tmp_path_factory.mktemp("encoder") / "bart", sample)


@pytest.fixture(scope="module", params=["default", "rudder"])
def head(request, encoder, tmp_path_factory):
    kind = {"redist_type": "RUDDER"} if request.param == "rudder" else {}
    return write_head(tmp_path_factory.mktemp("runs") / "run", encoder, request.param, **kind)


@pytest.fixture(scope="module")
def few(sample, tmp_path_factory):
    """Eight conversations of the sample, and a folder that is none."""
    folder = tmp_path_factory.mktemp("few") / "candor"
    for path in sorted(path for path in sample.iterdir() if path.is_dir())[:8]:
        shutil.copytree(path, folder / path.name)
    (folder / "broken").mkdir()
    return folder


def score(data, head, out, *more, check=0):
    return call_script(TOOL, data, "--reward_path", head, "--out", out, "--device", "cpu", *more, check=check)


def test_both_peoples_turns_get_the_rewards_of_stage_2(few, head, tmp_path):
    printed = score(few, head, tmp_path / "scored.parquet").stdout
    table = pd.read_parquet(tmp_path / "scored.parquet")
    shutil.copytree(few, tmp_path / "usable", ignore=shutil.ignore_patterns("broken"))
    corpus = read_corpus(tmp_path / "usable", "overall_affect")
    trajectories = [t for both in corpus.trajectories.values() for t in both]
    turns, loaded = TurnSet.from_trajectories(trajectories, context_turns=4), load_reward_head(head)
    encoder = load_encoder_of_head(loaded.config, head, 256, None)
    expected = head_rewards(loaded, encoder.encode(encoder.tokenize(turns.texts), nullcontext), turns)
    found = table.set_index(["conversation_id", "speaker", "turn"])["reward"]
    assert len(table) == sum(len(c.turns) for c in corpus.conversations) and not table.isna().any(axis=None)
    for i, trajectory in enumerate(trajectories):
        names = [trajectory.conversation.turns[k].turn_id for k in trajectory.agent_turns]
        rewards = [found[trajectory.conversation.id, trajectory.agent, name] for name in names]
        assert rewards == pytest.approx(expected[turns.turns_of(i)], abs=1e-6)
    assert table["conversation_id"].drop_duplicates().is_monotonic_increasing
    assert "Dropped 1 conversations: transcript_cliffhanger.csv" in printed and "broken: " in printed
    *_, mean, points, _speed = printed.splitlines()[-3].split()
    assert float(points) == pytest.approx(160 * float(mean), rel=1e-2)


def test_the_assistants_messages_of_chats_get_rewards(head, tmp_path):
    lines = [json.dumps(CHAT), json.dumps({"id": 7, "messages": CHAT[1:3]}), "", "{", '"Hello"', '[{"role": "tool"}]']
    lines += [json.dumps([{"role": "user", "content": "\ud800"}]), '{"messages": [3]}', json.dumps(CHAT[:2])]
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats/b.jsonl").write_bytes("\n".join(lines).encode() + b'\n["\xff"]')
    (tmp_path / "chats/a.jsonl").write_text(json.dumps(CHAT))
    printed = score(tmp_path / "chats", head, tmp_path / "scored.csv").stdout
    table = pd.read_csv(tmp_path / "scored.csv")
    assert table["conversation_id"].tolist() == ["a.jsonl:1"] * 4 + ["b.jsonl:1"] * 4 + ["7"] * 2 + ["b.jsonl:9"]
    assert table["turn"].tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 0, 1, 1]
    assert table["text"][1] == CHAT[2]["content"] and table["speaker"][1] == "assistant"
    rewards = table["reward"].to_numpy()
    assert np.isnan(rewards).tolist() == [True, False] * 5 + [True]
    assert rewards[:4] == pytest.approx(rewards[4:8], abs=1e-6, nan_ok=True)
    assert "Dropped 2 conversations: text that is not valid Unicode." in printed
    for said in ("4: not JSON", "5: expected a list of chat messages, found str", "6: message 0: ", "8: message 0: "):
        assert f"  b.jsonl:{said}" in printed


def test_a_run_that_died_is_continued_and_the_table_is_the_same(few, head, tmp_path, monkeypatch):
    monkeypatch.setattr(labelling, "TURNS_A_PART", 25)
    whole, out, calls = tmp_path / "whole.parquet", tmp_path / "out.parquet", []
    score(few, head, whole)

    def dies_at_the_third(dialogues, reward, part=labelling.score_part):
        calls.append(dialogues)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return part(dialogues, reward)

    monkeypatch.setattr(labelling, "score_part", dies_at_the_third)
    score(few, head, out, check=130)
    assert not out.exists() and len(list((tmp_path / "out.parquet.parts").glob("part-*"))) == 2
    refused = score(few, head, out, "--context_turns", 2, check=2).stderr
    assert "parts of an earlier run with another context_turns" in refused
    assert "Continuing with 2 parts" in score(few, head, out).stdout
    assert out.read_bytes() == whole.read_bytes() and not (tmp_path / "out.parquet.parts").exists()
    assert len(calls) == 3 + 2 and whole.stat().st_mode & 0o777 == 0o600
    assert "exists already" in score(few, head, out, check=2).stderr


def lines_of(*conversations, mark: str = "") -> bytes:
    return (mark + "".join(f"{json.dumps(content)}\n" for content in conversations)).encode()


A, B = {"id": "a", "messages": CHAT[1:3]}, {"id": "b", "messages": CHAT[3:]}
THINKS = [CHAT[1], {"role": "assistant", "content": f"<think>\nThey greet.\n</think>\n\n{CHAT[2]['content']}"}]


def test_cases_a_byte_order_mark_and_thoughts_are_no_text_and_an_id_stands_for_one(head, tmp_path):
    thinks = {"id": "c", "messages": THINKS}
    (tmp_path / "chats.jsonl").write_bytes(lines_of(A, B, thinks, {"id": "a", "messages": CHAT[3:]}, mark="\ufeff"))
    printed = score(tmp_path / "chats.jsonl", head, tmp_path / "scored.csv").stdout
    table = pd.read_csv(tmp_path / "scored.csv")
    assert table["conversation_id"].tolist() == ["a"] * 2 + ["b"] * 2 + ["c"] * 2
    rewards = table["reward"].dropna().tolist()
    assert rewards[0] == pytest.approx(rewards[2], abs=1e-6) and table["text"][1] == table["text"][5]
    assert "Dropped 1 conversations: an id that a conversation before it has." in printed
    assert "  chats.jsonl:4: " in printed


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lines_of(A, B).decode().encode("utf-16"), "found UTF-16: convert it"),
        (b"\n" + json.dumps([A, B], indent=1).encode(), "found JSON over several lines"),
        (json.dumps(A, indent=1).encode(), "found JSON over several lines"),
        (json.dumps([A, B]).encode(), "found an array of conversations"),
        (lines_of({"conversations": [{"from": "human", "value": "hi"}]}), "found ShareGPT's form"),
        (gzip.compress(lines_of(A, B)), "found gzip under a name without .gz"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
        (lines_of({"prompt": "hi", "completion": "ho"}), "no messages, but prompt, completion (1)"),
        (lines_of({"messages": [{"role": "user", "content": "[INST] hi [/INST]"}]}), "found '[INST]'"),
    ],
)
def test_cases_another_form_than_jsonl_is_named(content, said, head, tmp_path):
    (tmp_path / "chats.jsonl").write_bytes(content)
    printed = score(tmp_path / "chats.jsonl", head, tmp_path / "scored.csv", check=2).stderr
    assert said in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bom", ["a", "a", "b", "b"]), ("think", ["a", "a", "b", "b"]), ("whole_array", "JSON over several lines"),
        ("sharegpt", "ShareGPT"), ("utf16", "UTF-16"),
    ],
)  # fmt: skip
def test_cases_of_jsonl(name, said, head, tmp_path):
    path = case(f"jsonl/{name}.jsonl")
    printed = score(path, head, tmp_path / "scored.csv", check=2 * isinstance(said, str))
    if isinstance(said, str):
        assert f"found {said}" in printed.stderr
    else:
        table = pd.read_csv(tmp_path / "scored.csv")
        assert table["conversation_id"].tolist() == said and "Dropped" not in printed.stdout
        if name == "think":
            assert table["reward"][1] == pytest.approx(table["reward"][3], abs=1e-6)


@pytest.mark.parametrize(
    ("data", "out", "said"),
    [
        ("nowhere", "a.csv", "nowhere: expected a JSONL file, or a folder of conversations, found nothing"),
        ("empty", "a.csv", "expected JSONL files, or a folder for each conversation, found neither"),
        ("bad.jsonl", "a.csv", "no usable conversation: not JSON (1)"),
        ("bad.jsonl", "a.txt", "a name that ends with .parquet or .csv is expected"),
    ],
)
def test_mistakes_are_answered_in_one_line(data, out, said, head, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text("{")
    printed = score(tmp_path / data, head, tmp_path / out, check=2).stderr
    assert said in printed and printed.count("\n") == 1 and not list(tmp_path.glob("a.*"))
