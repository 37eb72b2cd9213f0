"""`--seed`: the same seed gives the same run, and each random choice of a run follows it.

Each test stops a command where training would begin, and looks at what was drawn until then and at the generators from
which training draws. Every one of these must be the same for the same seed and differ for another.
"""

import numpy as np
import pytest
import torch
from conftest import call_script

import train_reward_GELI
import train_reward_LI_only
import train_rl_GELI
from experiments.known_optimum import make_model, prompts, share_of_good_words
from geli.nets.options import Adapter
from geli.nets.policy import load_policy
from geli.rl import trl_algorithms


@pytest.fixture
def drawn(sample, tiny, tmp_path, monkeypatch):
    """Runs a command up to where its training begins; returns what `look` makes of the stage."""
    monkeypatch.setenv("WANDB_MODE", "disabled")

    def drawn(module, look, seed, *options):
        found = {}

        def stop(stage, *_, **__):
            found.update(look(stage))
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "train_steps", stop)
        data = ("--data_dir", sample, "--output_dir", tmp_path, "--context_turns", 2, "--train_size", 6)
        call_script(f"{module.__name__}.py", *data, "--seed", seed, *options, check=130)
        return found

    return drawn


def assert_all_follow_the_seed(run):
    first, again, other = run(0), run(0), run(1)
    assert first == again
    assert [name for name in first if first[name] == other[name]] == []


def first_layer(head) -> list:
    return head.layers[0].weight.flatten().tolist()


def test_stage_1_initial_head_order_of_turns_and_validation_turns(drawn, tiny):
    def look(stage):
        return {
            "head": first_layer(stage.head),
            "order": [batch.tolist() for _, batch in stage.batches],
            "later draws": stage.rng.random(),
            "validation turns": stage.chosen.tolist(),
            "dropout": torch.rand(1).item(),
        }

    options = ("--lang_model_path", tiny / "bart", "--val", "--K", 2, "--batch_size", 8)
    assert_all_follow_the_seed(lambda seed: drawn(train_reward_LI_only, look, seed, *options))


def test_stage_2_initial_head_and_order_of_conversations(drawn, tiny):
    def look(stage):
        stage.epoch_steps, stage.trajectory_loss = 6, stop_at_batch
        with pytest.raises(StopIteration):
            stage.step(1)
        turns = [stage.sample([0], stage.rngs[0], 1)[0].turns.tolist() for _ in range(9)]
        return {"head": first_layer(stage.head), "order": stage.order["groups"], "subsets": turns}

    def stop_at_batch(*_):
        raise StopIteration

    options = ("--train", "--lang_model_path", tiny / "bart", "--K", 2)
    assert_all_follow_the_seed(lambda seed: drawn(train_reward_GELI, look, seed, *options))


def test_stage_3_adapter_order_lengths_tokens_random_reward_and_held_out_prompts(drawn, tiny, monkeypatch):
    evaluated = []

    def evaluate(policy, score, held_out, accelerator, *, seed, **sizes):
        evaluated[:] = [seed, [prompt.name for prompt in held_out]]
        return {}, [], [0.0] * len(held_out)

    def look(stage):
        ppo = stage.ppo
        return {
            "adapter": [p.flatten().tolist() for p in ppo.policy.trainable() if p.abs().sum() > 0],
            "order": stage.rng.permutation(20).tolist(),
            "lengths": ppo.rng.integers(1000, size=3).tolist(),
            "tokens": torch.rand(3, generator=ppo.sampling).tolist(),
            "reward": ppo.score(None, [""] * 3).tolist(),
            "evaluation": evaluated[0],
            "held out": evaluated[1],
        }

    monkeypatch.setattr(train_rl_GELI, "evaluate_policy", evaluate)
    options = ("--model_name", tiny / "llama", "--reward", "random", "--train", "--val", "--val_prompts", 4)
    assert_all_follow_the_seed(lambda seed: drawn(train_rl_GELI, look, seed, *options))


def test_trls_trainers_and_the_warm_start_get_the_seed(sample, tiny, tmp_path, monkeypatch):
    seeds = []

    def stop(*_, seed, **__):
        seeds.append(seed)
        raise KeyboardInterrupt

    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(trl_algorithms, "train", stop)
    monkeypatch.setattr(trl_algorithms, "sft", stop)
    options = ("--data_dir", sample, "--output_dir", tmp_path, "--model_name", tiny / "llama", "--reward", "random")
    for more in (("--algo", "rloo"), ("--algo", "grpo"), ("--sft_steps", 2)):
        call_script("train_rl_GELI.py", *options, "--train", "--seed", 7, *more, check=130)
    assert seeds == [7, 7, 7]


def test_trls_order_of_prompts_follows_the_seed(tmp_path):
    pytest.importorskip("trl")
    model, chosen = make_model(tmp_path / "llama", seed=0), prompts(np.random.default_rng(0), 16)

    def order(seed):
        asked = []

        def score(prompts, responses):
            asked.extend((prompt.text, response) for prompt, response in zip(prompts, responses, strict=True))
            return share_of_good_words(prompts, responses)

        torch.manual_seed(0)
        trl_algorithms.train(
            "rloo", load_policy(str(model), Adapter(4, 8), torch.float32), chosen, score, lambda *_: None, steps=1,
            batch_size=4, learning_rate=1e-2, seed=seed, generations=2, max_new_tokens=4, options=(),
        )  # fmt: skip
        return asked

    first = order(0)
    assert first == order(0)
    assert {text for text, _ in first} != {text for text, _ in order(1)}


@pytest.mark.parametrize("script", ["train_reward_LI_only.py", "train_reward_GELI.py"])
def test_a_seed_gives_the_same_bytes_and_another_seed_other_weights(script, sample, tiny, tmp_path, monkeypatch):
    """Whole runs; those of stage 3 are compared in test_commands.py."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train = () if "LI_only" in script else ("--train",)
    sizes = ("--epochs", 1, "--train_size", 4, "--context_turns", 2, "--small_model_shrink", "--learning_rate", 1e-3)
    options = ("--data_dir", sample, "--output_dir", tmp_path, "--lang_model_path", tiny / "bart", *train, *sizes)
    heads = []
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        call_script(script, *options, "--run_name", run, "--seed", seed)
        # the head's metadata names its encoder's folder, which has the run's name
        heads.append(next(tmp_path.glob(f"*/reward1_{run}")).read_bytes().replace(f"lang_model_{run}".encode(), b""))
    assert heads[0] == heads[1] != heads[2]
