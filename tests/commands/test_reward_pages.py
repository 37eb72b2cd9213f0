"""The code on docs/reward_for_trainers.md runs as it stands there, with names of what is here."""

import pytest
from conftest import ROOT, small_model
from page_code import blocks, execute
from small_models import chat_model, write_head

from geli import GELIReward

TRL, FUNCTION, VERL = blocks(ROOT / "docs/reward_for_trainers.md")
STATES = [[{"role": "user", "content": text}] for text in ("I lost my job today.", "Hello!")]
SAID = ["I am so sorry, do you want to talk about it?", "Hi! How was your day?"]


@pytest.fixture(scope="module")
def head(sample, tmp_path_factory):
    encoder = small_model("bart", tmp_path_factory.mktemp("encoder") / "bart", sample)
    return write_head(tmp_path_factory.mktemp("runs") / "run", encoder)


def test_trl(head, sample, tmp_path):
    policy = chat_model(small_model("llama", tmp_path / "llama", sample), tmp_path / "chat")
    short = {"max_steps=100": "max_steps=1"}
    folder = {'"aligned"': repr(str(tmp_path / "aligned"))}
    ran = execute(TRL, RUN=str(head), MODEL=str(policy), **short, **folder)
    assert "rewards/GELIReward/mean" in ran["trainer"].state.log_history[0]
    assert max(block.count("\n") for block in (TRL, FUNCTION, VERL)) <= 25


@pytest.mark.skipif(not (ROOT / "apps/serve").is_dir(), reason="there is no apps/serve")
def test_openrlhfs_function(head):
    expected = pytest.approx(GELIReward.load(head, device="cpu")(STATES, SAID), abs=1e-6)
    prompts = ["<|im_start|>user\nI lost my job today.<|im_end|>\n<|im_start|>assistant\n", "Hello!"]
    queries = [f"{prompts[0]}{SAID[0]}<|im_end|>", f"{prompts[1]} {SAID[1]}</s>"]
    function = execute(FUNCTION, RUN=str(head))["reward_func"]
    assert function(queries, prompts, [None, None])["rewards"].tolist() == expected


def test_verls_function(head):
    expected = pytest.approx(GELIReward.load(head, device="cpu")(STATES, SAID), abs=1e-6)
    compute_score = execute(VERL, RUN=str(head))["compute_score"]
    assert compute_score(["chat"] * 2, SAID, [None] * 2, [{"prompt": state} for state in STATES]) == expected
