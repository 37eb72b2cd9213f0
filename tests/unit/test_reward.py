"""GELIReward gives the scores of stages 2 and 3 for the same text, in any form and thread, and in TRL's trainers."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from chat_templates import TEMPLATES, render
from conftest import ROOT, small_model
from small_models import write_head

import train_rl_GELI
from data_utils import TurnSet, make_prompts, read_corpus, split
from geli import GELIReward
from geli.heads import load_encoder_of_head, load_reward_head
from geli.nets.prompts import Prompt
from geli.rl.reward_functions import FunctionScorer
from geli.rl.rollout import first_turn
from geli.run.distributed import make_accelerator
from geli.run.errors import UserError
from models import head_rewards

SAID = ("Hello there.", "Oh, really? I like\nit.", "日本語 🙂", "")


@pytest.fixture(scope="module")
def encoder(sample, tmp_path_factory):
    return small_model("bart", tmp_path_factory.mktemp("encoder") / "bart", sample)


@pytest.fixture(scope="module", params=["default", "small_model_shrink", "rudder"])
def head(request, encoder, tmp_path_factory):
    kind = {"redist_type": "RUDDER"} if request.param == "rudder" else {}
    return write_head(tmp_path_factory.mktemp("runs") / f"baselines_{request.param}", encoder, request.param, **kind)


@pytest.fixture(scope="module")
def trajectories(sample):
    return split(read_corpus(sample, "overall_affect"), 2)[0]


@pytest.fixture(scope="module")
def prompts(trajectories):
    return make_prompts(trajectories, context_turns=4)


def stage_3_scorer(head):
    """What train_rl_GELI.py scores by with `--reward_path`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return train_rl_GELI.load_score(train_rl_GELI.Options(), make_accelerator("cpu", "float32"), head)


def chat(prompt) -> list[dict]:
    """A prompt as chat messages."""
    turns = [{"role": "assistant" if is_agent else "user", "content": text} for is_agent, text in prompt.turns]
    return [{"role": "system", "content": "Be kind."}, *turns]


def test_scores_are_those_of_stage_3(head, prompts):
    responses = [SAID[i % 4] for i in range(len(prompts))]
    expected = stage_3_scorer(head)(prompts, responses).tolist()
    assert np.std(expected) > 1e-4
    assert GELIReward.load(head, device="cpu")(prompts, responses) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", TEMPLATES)
def test_cases_a_templates_text_scores_as_its_messages(head, family):
    reward, talk = GELIReward.load(head, device="cpu"), []
    for i, said in enumerate(("I lost my job.", "Oh no.", "Yes,\ntoday.", "Why?", "日本語 🙂")):
        talk.append({"role": ("user", "assistant")[i % 2], "content": said})
    asked = [talk[:n] for n in (1, 3, 5)]
    texts = [render(TEMPLATES[family], messages, add_generation_prompt=True) for messages in asked]
    expected = reward(asked, ["I am sorry."] * 3)
    said = "They are sad.</think>\n\nI am sorry." if family == "DeepSeek-R1" else "I am sorry."
    assert reward(texts, [said] * 3) == pytest.approx(expected, abs=1e-6) and np.std(expected) > 1e-6


@pytest.mark.parametrize("form", ["text", "chat"])
def test_texts_and_chats_score_as_the_states_they_were_made_from(head, prompts, form):
    reward = GELIReward.load(head, device="cpu")
    # a sequential head takes the turns so far to be the whole trajectory, which these prompts are then
    asked = [p._replace(trajectory=p.trajectory[: p.position + 1]) for p in prompts if p.position < 2]
    responses = [SAID[i % 4] for i in range(len(asked))]
    expected = stage_3_scorer(head)(asked, responses).tolist()
    if form == "text":
        found = reward([p.text for p in asked], [f" {said} User: and so on" for said in responses], solution=[1])
    else:
        said = [[{"role": "assistant", "content": f"{text} AI: more"}] for text in responses]
        found = reward(prompts=list(map(chat, asked)), completions=said, completion_ids=None, trainer_state=None)
    assert found == pytest.approx(expected, abs=1e-6)


def test_turn_rewards_are_those_of_stage_2(head, trajectories):
    turns = TurnSet.from_trajectories(trajectories, context_turns=4)
    loaded = load_reward_head(head)
    encoder = load_encoder_of_head(loaded.config, head, 256, None)
    expected = head_rewards(loaded, encoder.encode(encoder.tokenize(turns.texts), nullcontext), turns)
    reward = GELIReward.load(head, device="cpu")
    messages = [
        [{"role": "user" if t.speaker == trajectory.user else "assistant", "content": t.utterance}
         for t in trajectory.conversation.turns]
        for trajectory in trajectories
    ]  # fmt: skip
    found = list(map(reward.turn_rewards, [*messages, []]))
    assert list(map(len, found)) == [*np.diff(turns.offsets), 0]
    assert np.concatenate(found) == pytest.approx(expected, abs=1e-6)


def test_stage_3_takes_it_as_a_reward_function(head, prompts, tmp_path, monkeypatch):
    code = f"from geli import GELIReward\nreward = GELIReward.load({str(head)!r}, device='cpu')\n"
    (tmp_path / f"my_{head.name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    expected = stage_3_scorer(head)(prompts, SAID[:1] * len(prompts))
    found = FunctionScorer(f"my_{head.name}:reward", "--reward_function")(prompts, SAID[:1] * len(prompts))
    assert found.dtype == expected.dtype and torch.allclose(found, expected, atol=1e-6)


def test_threads_get_the_scores_that_one_thread_gets(head, prompts):
    asked, expected = prompts[:24], GELIReward.load(head, device="cpu")(prompts[:24], ["Oh, really?"] * 24)
    reward = GELIReward.load(head, device="cpu", cache_size=5)  # smaller than a batch: entries come and go

    def score(start: int) -> list[float]:
        order = np.roll(np.arange(24), start)
        found = reward([asked[i] for i in order], ["Oh, really?"] * 24)
        return np.array(found)[np.argsort(order)].tolist()

    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(score, range(0, 24, 2)):
            assert found == pytest.approx(expected, abs=1e-6)
    assert len(reward._cache) == 5


def test_a_text_is_computed_once(head, prompts, monkeypatch):
    reward, seen = GELIReward.load(head, device="cpu"), []
    encoder = reward.encoder
    tokenize = encoder.tokenize
    monkeypatch.setattr(encoder, "tokenize", lambda pairs: seen.extend(pairs) or tokenize(pairs))
    first = reward([prompts[0]] * 3, ["a", "b", "a"])
    assert first[0] == first[2] != first[1] and len([pair for pair in seen if pair[1] in ("AI: a", "AI: b")]) == 2
    seen.clear()
    assert reward([prompts[0]] * 2, ["b", "a"]) == [first[1], first[0]] and not seen
    assert reward([], []) == []
    shorter = prompts[3]._replace(trajectory=prompts[3].trajectory[:-1])
    rewards = reward([prompts[3], shorter], ["a", "a"])
    assert (rewards[0] != rewards[1]) == reward.head.sequential  # such a head's rewards depend on the whole trajectory


def test_it_is_found_by_folder_by_file_and_by_run(head):
    out, run = head.parent.parent, head.name.removeprefix("reward1_")
    head.with_name(f"{head.name}.json").write_text("{}")
    loaded = [GELIReward.from_pretrained(head.parent), GELIReward.load(str(head)), GELIReward.load(run, output_dir=out)]
    assert {reward.path.resolve() for reward in loaded} == {head.resolve()}
    assert loaded[0].context_turns == 4
    with pytest.raises(UserError, match="expected one reward head in this folder, found none"):
        GELIReward.load(out)
    with pytest.raises(UserError, match="nobody: expected a run name or the path"):
        GELIReward.load("nobody", output_dir=out)
    with pytest.raises(UserError, match="records its own encoder"):  # not what --lang_model_path names
        GELIReward.load(head, lang_model_path="another")
    with pytest.raises(UserError, match="expected a completion to each prompt, found 1 and 2"):
        loaded[0](["a"], ["b", "c"])


def test_importing_the_package_does_not_import_torch():
    subprocess.run([sys.executable, "-c", "import sys, geli; assert 'torch' not in sys.modules"], cwd=ROOT, check=True)
    with pytest.raises(ImportError):
        from geli import SomethingElse  # noqa: F401


@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_trls_trainers_take_it_as_it_is(algorithm, encoder, sample, prompts, tmp_path, monkeypatch):
    import trl
    from datasets import Dataset
    from small_models import chat_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    head = write_head(tmp_path / "run", encoder, "small_model_shrink")
    score, reward, calls = stage_3_scorer(head), GELIReward.load(head, device="cpu"), []
    AcceleratorState._reset_state(reset_partial_state=True)
    call = GELIReward.__call__
    monkeypatch.setattr(
        GELIReward, "__call__", lambda self, **columns: calls.append((columns, call(self, **columns))) or calls[-1][1]
    )
    policy = chat_model(small_model("llama", tmp_path / "llama", sample), tmp_path / "chat")
    asked = [prompt for prompt in prompts if prompt.turns and not prompt.turns[-1][0]][:8]
    form = chat if algorithm == "GRPO" else lambda prompt: prompt.text
    rows = {"prompt": list(map(form, asked)), "index": list(range(len(asked))), "solution": ["x"] * len(asked)}
    config = getattr(trl, f"{algorithm}Config")(
        output_dir=str(tmp_path / "out"), max_steps=5, per_device_train_batch_size=4, num_generations=2,
        max_completion_length=8, report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
        bf16=False,
    )  # fmt: skip
    trainer = getattr(trl, f"{algorithm}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(policy), reward_funcs=reward, args=config,
        train_dataset=Dataset.from_dict(rows), processing_class=AutoTokenizer.from_pretrained(policy),
    )  # fmt: skip
    trainer.train()
    logged = [row["rewards/GELIReward/mean"] for row in trainer.state.log_history if "reward" in row]
    assert trainer.state.global_step == 5 == len(calls) == len(logged)
    for (columns, rewards), mean in zip(calls, logged, strict=True):
        said = [c if isinstance(c, str) else c[0]["content"] for c in columns["completions"]]
        expected = score([asked[i] for i in columns["index"]], list(map(first_turn, said))).tolist()
        assert rewards == pytest.approx(expected, abs=1e-6)
        assert mean == pytest.approx(np.mean(rewards), abs=1e-5)
    assert torch.tensor([rewards for _, rewards in calls]).std() > 0


class LengthEncoder:
    """Features (n, 1): the number of letters of context and response."""

    device = torch.device("cpu")

    def __init__(self):
        self.encoded = []

    def tokenize(self, pairs):
        return list(pairs)

    def encode(self, pairs, autocast):
        self.encoded += pairs
        with autocast():
            return torch.tensor([[float(len(context) + len(response))] for context, response in pairs]).reshape(-1, 1)


class SumHead(torch.nn.Module):
    """A sequential head: the reward of a turn is the sum of the features up to it, over the number of turns."""

    sequential = True

    def forward(self, features):
        return torch.cat([torch.zeros_like(features[:, :1]), features.cumsum(dim=1)], dim=1)

    def rewards(self, outputs, n_turns):
        return outputs[:, 1:] / n_turns


class NegativeHead(torch.nn.Module):
    """A head that sees one turn."""

    sequential = False

    def forward(self, features):
        return -features


def test_a_reward_is_that_of_the_context_and_the_response():
    reward = GELIReward(LengthEncoder(), NegativeHead(), context_turns=1)
    assert reward.score([Prompt("", "abc", ""), Prompt("", "", "")], ["x", "xyz"]).tolist() == [-8, -7]  # with "AI: "


def test_a_sequential_head_sees_the_real_turns_before_a_response():
    turns = (("a", "b"), ("aa", "bb"), ("aaa", "bbb"))
    asked = [Prompt("", "c", "", turns, position) for position in (2, 0, 1)]
    encoder = LengthEncoder()
    reward = GELIReward(encoder, SumHead(), context_turns=1)
    for _ in range(2):
        assert reward.score(asked, ["x"] * 3).tolist() == pytest.approx([(6 + 2 + 4) / 3, 6 / 3, (6 + 2) / 3])
    assert reward.score([], []).shape == (0,)  # of a process without a prompt
    assert encoder.encoded.count(("a", "b")) == 1  # real turns are encoded once
    assert ("aaa", "bbb") not in encoder.encoded  # turns from the prompt's position on are not needed
