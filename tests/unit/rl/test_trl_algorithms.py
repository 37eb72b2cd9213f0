"""TRL's trainers on our policy: RLOO, GRPO and SFT."""

import numpy as np
import pytest
import torch
import trl
from accelerate.state import AcceleratorState
from cases import case
from conftest import small_model

from data_utils import read_corpus, split, turn_text
from experiments.known_optimum import make_model, prompts, share_of_good_words
from geli.nets.options import MAX_NEW_TOKENS, Adapter
from geli.nets.policy import load_policy
from geli.nets.prompts import Prompt, prompt_text
from geli.rl import trl_algorithms
from geli.rl.evaluation import evaluate_policy
from geli.run.distributed import make_accelerator
from geli.run.errors import UserError
from models import PPO, PPOConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("optimum") / "llama", seed=0)


@pytest.fixture(scope="module")
def human_prompts(sample):
    """Training prompts with human answers."""
    trajectories, _ = split(read_corpus(sample, "overall_affect"), 40)
    turns = [turn_text(t.conversation, i, t.user, 2) for t in trajectories for i in t.agent_turns]
    return [Prompt(prompt_text(context), context, answer.removeprefix("AI: ")) for context, answer in turns]


def policy_of(folder):
    torch.manual_seed(0)
    return load_policy(str(folder), Adapter(4, 8), torch.float32)


@torch.no_grad()
def nats_a_token(policy, prompts) -> float:
    """The policy's own cross-entropy of the human answers and the end tokens behind them."""
    query, query_mask = policy.tokenize(prompts)
    answers = [[*policy.tokenizer(f" {p.human}", add_special_tokens=False).input_ids, policy.end] for p in prompts]
    response, mask = (torch.zeros(len(prompts), max(map(len, answers)), dtype=torch.long) for _ in range(2))
    for row, answer in enumerate(answers):
        response[row, : len(answer)], mask[row, : len(answer)] = torch.tensor(answer), 1
    return -(policy(query, query_mask, response, mask)[0].sum() / mask.sum()).item()


# ---------------------------------------------------------------------------------------------------------------------
# RLOO and GRPO


def train(policy, algo="rloo", options=("beta=0.1",), on_step=lambda *_: None, score=share_of_good_words, **changes):
    arguments = dict(steps=2, batch_size=8, learning_rate=1e-2, seed=0, generations=4, max_new_tokens=6)
    chosen = prompts(np.random.default_rng(0), 16)
    trl_algorithms.train(algo, policy, chosen, score, on_step, options=options, **{**arguments, **changes})


@pytest.mark.parametrize("algo", ["rloo", "grpo"])
def test_a_policy_is_trained_in_place_and_each_step_is_reported(algo, model):
    policy, logged = policy_of(model), []
    before = [p.detach().clone() for p in policy.trainable()]
    train(policy, algo, on_step=lambda step, metrics: logged.append((step, metrics)))
    assert [step for step, _ in logged] == [1, 2]
    assert all({"score_mean", "score_std", "kl", "entropy", "response_length_mean"} <= m.keys() for _, m in logged)
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.trainable(), strict=True))
    assert not any(module.training for module in policy.modules())


def test_the_score_gets_our_prompts_and_one_turn_of_each_response(model):
    policy, seen = policy_of(model), []
    decode = policy.tokenizer.batch_decode
    policy.tokenizer.batch_decode = lambda *args, **more: [f" {text} User: more" for text in decode(*args, **more)]

    def score(asked, responses):
        seen.extend(zip(asked, responses, strict=True))
        return torch.zeros(len(responses))

    train(policy, score=score, steps=1)
    assert len(seen) == 8 and len({prompt.text for prompt, _ in seen}) == 2  # 4 responses to each of 2 prompts
    assert all("User:" not in text and text == text.strip() for _, text in seen)


@pytest.mark.parametrize("algo", ["rloo", "grpo"])
def test_an_invented_next_turn_is_neither_scored_nor_trained_on(algo, model, monkeypatch):
    """Every completion is w05 w06 w07 User: w08 AI:, in tokens w05 w06 w07 w20 w08 w21 by name."""
    policy, scored, trained, logged = policy_of(model), [], [], []
    words = {"w20": "User:", "w21": "AI:"}
    decode = policy.tokenizer.batch_decode
    policy.tokenizer.batch_decode = lambda *args, **more: [
        " ".join(words.get(word, word) for word in text.split()) for text in decode(*args, **more)
    ]
    said = torch.tensor(policy.tokenizer("w05 w06 w07 w20 w08 w21", add_special_tokens=False).input_ids)
    monkeypatch.setattr(
        type(policy.model), "generate",
        lambda self, input_ids, **_: torch.cat([input_ids, said.expand(len(input_ids), -1)], dim=1),
    )  # fmt: skip
    kind = {"rloo": trl.RLOOTrainer, "grpo": trl.GRPOTrainer}[algo]
    compute_loss = kind.compute_loss

    def loss(self, model, inputs, *args, **more):
        trained.extend(
            ids[mask.bool()].tolist()
            for ids, mask in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)
        )
        return compute_loss(self, model, inputs, *args, **more)

    monkeypatch.setattr(kind, "compute_loss", loss)

    def score(asked, responses):
        scored.extend(responses)
        return torch.arange(len(responses)).float()

    train(policy, algo, score=score, steps=1, on_step=lambda step, metrics: logged.append(metrics))
    assert scored == ["w05 w06 w07"] * 8 and trained == [said[:3].tolist()] * 8
    assert logged[0]["response_length_mean"] == 3 and logged[0]["cut_at_length_share"] == 0


@pytest.mark.parametrize("prompt_format", ["raw", "chat"])
def test_cases_every_algorithm_and_the_evaluation_end_at_either_of_two_end_tokens(prompt_format):
    """Of a model that is sure of every token, so that random numbers play no part."""
    folder, asked = str(case("models/c06_two_ends")), []
    for text in ("hi", "how are you?"):
        asked.append(Prompt(prompt_text(f" User: {text}"), f" User: {text}", "x", turns=((False, text),)))
    found, lengths = {}, []

    def score(prompts, responses):
        found.setdefault(name, []).extend(responses)
        return torch.zeros(len(responses))

    for name in ("ppo", "rloo", "grpo", "evaluation"):
        policy = load_policy(folder, Adapter(4, 8), torch.float32, prompt_format=prompt_format)
        if name == "ppo":
            PPO(policy, score, PPOConfig(batch_size=2), make_accelerator("cpu", "float32"), 0).step(asked)
            found[name] = found[name][:2]  # the others are the human answers'
        elif name == "evaluation":
            sizes = dict(batch_size=2, mini_batch_size=2, min_new_tokens=8, max_new_tokens=8)
            measured = evaluate_policy(policy, score, asked, make_accelerator("cpu", "float32"), seed=0, **sizes)
            assert measured.metrics["ended_share"] == 1
        else:
            trl_algorithms.train(
                name, policy, asked, score, lambda _, metrics: lengths.append(metrics["response_length_mean"]), steps=1,
                batch_size=2, learning_rate=1e-5, seed=0, generations=2, max_new_tokens=8,
            )  # fmt: skip
    assert {text for texts in found.values() for text in texts} == {"Hi." if prompt_format == "raw" else "user"}
    assert set(found) == {"ppo", "rloo", "grpo", "evaluation"} and set(lengths) == {4 if prompt_format == "raw" else 5}


def test_kl_is_per_response():
    metrics = trl_algorithms._ppo_metrics({"reward": 0.5, "kl": 0.1, "completions/mean_length": 20.0, "other": 1})
    assert metrics == {"score_mean": 0.5, "kl": pytest.approx(2.0), "response_length_mean": 20.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(batch_size=6), "--batch_size 6: expected a multiple of --num_generations 4, which is 2 or more"),
        (dict(generations=1), "expected a multiple of --num_generations 1, which is 2 or more"),
        (dict(processes=3), "which is 2 or more, times the 3 processes"),
        (dict(options=["no_such_option=1"]), "--trl: TRL's RLOOConfig does not take this"),
        (dict(options=["beta"]), "--trl beta: expected name=value, such as use_vllm=true"),
        (dict(options=["use_vllm=true"]), "--trl: TRL needs a package that is missing: vLLM"),
    ],
)
def test_what_trl_does_not_take_is_refused(changes, message, model):
    with pytest.raises(UserError, match=message):
        train(policy_of(model), **changes)


def test_options_are_json_or_text():
    words = ["beta=0.1", "use_vllm=true", "loss_type=dapo", "report_to=[]", "a=b=c"]
    expected = {"beta": 0.1, "use_vllm": True, "loss_type": "dapo", "report_to": [], "a": "b=c"}
    assert trl_algorithms.parse_options(words) == expected


def test_accelerates_state_is_the_same_afterwards(model):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator("cpu", "float32")
    before = dict(AcceleratorState._shared_state)
    train(policy_of(model), steps=1)
    assert dict(AcceleratorState._shared_state) == before and accelerator.mixed_precision == "no"


# ---------------------------------------------------------------------------------------------------------------------
# SFT


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_is_that_of_the_answers_given_the_prompts_of_rollouts(kind, human_prompts, sample, tmp_path):
    """Long prompts are cut, several minibatches make a step, and padding does not count."""
    policy = policy_of(small_model(kind, tmp_path / kind, sample))
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    cut = human_prompts[0]._replace(text=human_prompts[0].text + " User: so" * 200)
    chosen = [cut, *human_prompts[1:6]]
    assert len(policy.tokenizer(cut.text).input_ids) > policy.max_prompt_tokens
    expected, losses = nats_a_token(policy, chosen), []
    options = dict(steps=2, batch_size=6, learning_rate=1e-2, seed=0)
    trl_algorithms.sft(policy, chosen, lambda step, loss: losses.append((step, loss)), **options)
    assert [step for step, _ in losses] == [1, 2]
    assert losses[0][1] == pytest.approx(expected, rel=1e-4) and losses[1][1] < expected
    assert not any(module.training for module in policy.modules()) and policy.model.config.use_cache


def test_a_long_answer_is_cut_where_a_response_would_be_and_has_no_end_token(human_prompts, tiny):
    policy = policy_of(tiny / "llama")
    for answer, ends in (("good", True), ("good " * 300, False)):
        tokens, labels = trl_algorithms.sft_example(policy, human_prompts[0]._replace(human=answer))
        taught = [label for label in labels if label != -100]
        assert tokens[-len(taught) :] == taught and (taught[-1] == policy.end) == ends
        assert len(taught) <= MAX_NEW_TOKENS and len(tokens) == len(labels)
        assert policy.tokenizer.decode(tokens[: -len(taught)], skip_special_tokens=True) == human_prompts[0].text


def test_every_prompt_is_used_once_before_any_is_used_again(model):
    policy = policy_of(model)
    asked = [Prompt("w00", "", f"w{i:02d}") for i in range(5)]
    columns = trl_algorithms._sft_examples(policy, asked, 12, seed=0)
    answers = [tuple(ids) for ids in columns["input_ids"]]
    assert len(answers) == 12 and len(set(answers[:5])) == len(set(answers[5:10])) == 5
    assert columns == trl_algorithms._sft_examples(policy, asked, 12, seed=0)


def test_models_and_batches_that_sft_cannot_train_are_refused(model, sample, tmp_path):
    trl_algorithms.check_sft(str(model), 6, 2)
    with pytest.raises(UserError, match="expected --batch_size to be a multiple of the 4 processes"):
        trl_algorithms.check_sft(str(model), 6, 4)
    with pytest.raises(UserError, match="TRL trains decoder-only models"):
        trl_algorithms.check_sft(str(small_model("t5", tmp_path / "t5", sample)), 6, 2)
