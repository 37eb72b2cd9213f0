"""The code on docs/reward_for_trainers.md and docs/scoring.md runs as it stands there, with names of what is here."""

import re
import threading

import pandas as pd
import pytest
from conftest import ROOT, small_model
from small_models import chat_model, write_head

from geli import GELIReward

for name in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(name, reason=f"needs {name} (requirements-serve.txt)")
from apps.serve.server import RewardServer

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TRL, CLIENT, FUNCTION, VERL = BLOCK.findall((ROOT / "docs/reward_for_trainers.md").read_text())
RUN = "visual_feedback_baselines_convo_overall_affect_baseline_RRD_K_160/reward1_RUN"


@pytest.fixture(scope="module")
def head(sample, tmp_path_factory):
    encoder = small_model("bart", tmp_path_factory.mktemp("encoder") / "bart", sample)
    return write_head(tmp_path_factory.mktemp("runs") / "run", encoder)


def execute(code: str, **names: str) -> dict:
    """The variables of a block after it has run, with `names` in place of those on the page."""
    for written, here in names.items():
        written = {"RUN": RUN, "MODEL": "HuggingFaceTB/SmolLM2-135M-Instruct"}.get(written, written)
        assert code.count(written) == 1
        code = code.replace(written, here)
    variables = {}
    exec(code, variables)
    return variables


def test_trl(head, sample, tmp_path):
    policy = chat_model(small_model("llama", tmp_path / "llama", sample), tmp_path / "chat")
    short = {"max_steps=100": "max_steps=1", "report_to=[]": "report_to=[], use_cpu=True, bf16=False"}
    folder = {'"aligned"': repr(str(tmp_path / "aligned"))}
    ran = execute(TRL, RUN=str(head), MODEL=str(policy), **short, **folder)
    assert "rewards/GELIReward/mean" in ran["trainer"].state.log_history[0]
    assert max(block.count("\n") for block in (TRL, CLIENT, FUNCTION, VERL)) <= 25


def test_openrlhfs_client_and_function_and_verls_function(head, capsys):
    reward = GELIReward.load(head, device="cpu")
    server = RewardServer(reward, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        asked = execute(CLIENT, **{"http://127.0.0.1:5000": server.url})
    finally:
        server.should_exit = True
        thread.join(60)
    states = [[{"role": "user", "content": text}] for text in ("I lost my job today.", "Hello!")]
    said = ["I am so sorry, do you want to talk about it?", "Hi! How was your day?"]
    expected = pytest.approx(reward(states, said), abs=1e-6)
    rewards = asked["answer"].json()["rewards"]
    assert rewards == expected and str(rewards) in capsys.readouterr().out
    function = execute(FUNCTION, RUN=str(head))["reward_func"]
    assert function(asked["data"]["query"], asked["prompts"], [None, None])["rewards"].tolist() == expected
    compute_score = execute(VERL, RUN=str(head))["compute_score"]
    assert compute_score(["chat"] * 2, said, [None] * 2, [{"prompt": state} for state in states]) == expected


def test_scored_conversations(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table = pd.DataFrame({"conversation_id": list("aabb"), "reward": [0.1, 0.9, None, 0.2]})
    table.to_parquet("turn_rewards.parquet")
    (code,) = BLOCK.findall((ROOT / "docs/scoring.md").read_text())
    assert execute(code)["best"]["reward"].tolist() == [0.9] and "count" in capsys.readouterr().out
