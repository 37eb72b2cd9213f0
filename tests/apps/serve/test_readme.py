"""The client in the README runs as it stands there."""

import threading

import pytest
from conftest import ROOT, small_model
from page_code import blocks, execute
from small_models import write_head

from apps.serve.server import RewardServer
from geli import GELIReward


def test_openrlhfs_client(sample, tmp_path, capsys):
    (code,) = blocks(ROOT / "apps/serve/README.md")
    reward = GELIReward.load(write_head(tmp_path / "run", small_model("bart", tmp_path / "bart", sample)), device="cpu")
    server = RewardServer(reward, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        asked = execute(code, **{"http://127.0.0.1:5000": server.url})
    finally:
        server.should_exit = True
        thread.join(60)
    states = [[{"role": "user", "content": text}] for text in ("I lost my job today.", "Hello!")]
    said = ["I am so sorry, do you want to talk about it?", "Hi! How was your day?"]
    rewards = asked["answer"].json()["rewards"]
    assert rewards == pytest.approx(reward(states, said), abs=1e-6) and str(rewards) in capsys.readouterr().out
