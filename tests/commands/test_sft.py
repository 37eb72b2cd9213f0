"""`--sft_steps`: the warm start of stage 3 on the human answers, and what RL then starts from.

The loss itself is tested in unit/rl/test_trl_algorithms.py.
"""

import json
import shutil

import pytest
import torch
import wandb
from conftest import call_script, run_script, small_model, with_sizes
from no_pictures import quick_commands
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

import train_rl_GELI
from data_utils import make_prompts, read_corpus, split
from geli.nets.options import Adapter
from geli.nets.policy import load_policy

OF_BASE = {f"GELI_llama_base{end}" for end in (".json", "_report.html", "_before_after.png")}
WARM = ("--train", "--sft_steps", 3, "--sft_learning_rate", 5e-3)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Without wandb and pictures, and with short responses."""
    with quick_commands(min_new_tokens=4, max_new_tokens=8):
        yield


@pytest.fixture(scope="module")
def held_out(sample):
    """Held-out prompts with their human answers."""
    return make_prompts(split(read_corpus(sample, "overall_affect"), 40)[1], 2)


@pytest.fixture
def stage_3(sample, tiny, tmp_path):
    """Runs the command on the small Llama; a random reward needs no head."""

    def stage_3(*more, out=tmp_path, check=0):
        options = ("--data_dir", sample, "--output_dir", out, "--model_name", tiny / "llama", "--reward", "random")
        sized = with_sizes(more, steps=2, batch_size=4, val_prompts=4, context_turns=2, learning_rate=1e-2)
        return call_script("train_rl_GELI.py", *options, *sized, check=check)

    return stage_3


def policy_of(folder):
    return load_policy(str(folder), Adapter(16, 32), torch.float32)


@torch.no_grad()
def nats_a_token(policy, prompts) -> float:
    """The policy's own cross-entropy of the human answers and the end tokens behind them."""
    query, query_mask = policy.tokenize(prompts)
    answers = [[*policy.tokenizer(f" {p.human}", add_special_tokens=False).input_ids, policy.end] for p in prompts]
    response, mask = (torch.zeros(len(prompts), max(map(len, answers)), dtype=torch.long) for _ in range(2))
    for row, answer in enumerate(answers):
        response[row, : len(answer)], mask[row, : len(answer)] = torch.tensor(answer), 1
    return -(policy(query, query_mask, response, mask)[0].sum() / mask.sum()).item()


def test_smollm2_is_made_before_its_configuration_is_read(stage_3, tiny, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        train_rl_GELI, "make_smollm2", lambda folder: made.append(shutil.copytree(tiny / "llama", folder))
    )
    stage_3("--model_name", "smollm2", "--rf_model", "base", "--val", *WARM, "--sft_steps", 1)
    assert made == [tmp_path / "cache" / "smollm2"]
    assert (tmp_path / "rlmf_weights" / "GELI_smollm2_sft").is_dir()


def test_sft_alone_makes_held_out_human_answers_likelier(stage_3, held_out, tiny, tmp_path):
    printed = stage_3("--rf_model", "base", "--val", *WARM, "--sft_steps", 30).stdout
    assert "no RL" in printed and "SFT: " in printed
    weights = tmp_path / "rlmf_weights"
    assert {path.name for path in weights.iterdir()} == {"GELI_llama_sft", *OF_BASE}
    folders = (tiny / "llama", weights / "GELI_llama_sft")
    before, after = (nats_a_token(policy_of(path), held_out[:24]) for path in folders)
    assert after < before - 0.02  # the tokens that it hardly knows yet are frozen: there is little to gain
    assert set(json.loads((weights / "GELI_llama_base.json").read_text())["metrics"]) == {"before", "human"}
    assert json.loads((weights / "GELI_llama_sft" / "config.json").read_text())["use_cache"]


@pytest.mark.parametrize("algo", ["ppo", "rloo", "grpo"])
def test_the_reference_is_the_saved_model_and_the_adapter_loads_by_plain_peft(algo, stage_3, held_out, tmp_path):
    short = () if algo == "ppo" else ("--num_generations", 2)
    stage_3("--val", *WARM, "--algo", algo, *short)
    weights = tmp_path / "rlmf_weights"
    warm, checkpoint = weights / "GELI_llama_sft", weights / "GELI_llama_2"
    policy = policy_of(warm)
    ids, mask = policy.tokenize(held_out[:1])
    response = ids[:, -5:]
    seen = (ids[:, :-5], mask[:, :-5], response, mask[:, -5:])
    plain = AutoModelForCausalLM.from_pretrained(warm)

    def logprobs(model):
        return model(ids).logits[:, -6:-1].log_softmax(dim=-1).gather(2, response[:, :, None]).squeeze(2)

    with torch.no_grad():
        started = policy(*seen)[0]
        policy.load(checkpoint)
        with policy.reference():
            assert torch.equal(policy(*seen)[0], started)
        torch.testing.assert_close(started, logprobs(plain), atol=1e-5, rtol=1e-5)
        tuned = policy(*seen)[0]
        assert not torch.allclose(tuned, started, atol=1e-4)
        torch.testing.assert_close(tuned, logprobs(AutoPeftModelForCausalLM.from_pretrained(checkpoint)))
        torch.testing.assert_close(tuned, logprobs(PeftModel.from_pretrained(plain, checkpoint)))
    trained = json.loads((weights / "GELI_llama.json").read_text())["metrics"]
    assert abs(trained["before"]["kl"]) < 1e-4 and abs(trained["after"]["kl"]) > 1e-4
    stage_3("--val")  # finds the model that the checkpoint was trained on
    found = json.loads((weights / "GELI_llama_2_val.json").read_text())["metrics"]
    for when in ("before", "after"):
        assert found[when]["kl"] == pytest.approx(trained[when]["kl"], abs=1e-5)
        assert found[when]["response_words"] == trained[when]["response_words"]


@pytest.mark.slow
def test_a_seed_gives_the_same_bytes_and_another_seed_others(stage_3, tmp_path):
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        stage_3(*WARM, "--seed", seed, out=tmp_path / run)
    for name in ("sft/model.safetensors", "2/adapter_model.safetensors", "2/value_head.safetensors"):
        first, same, other = ((tmp_path / run / "rlmf_weights" / f"GELI_llama_{name}").read_bytes() for run in "abc")
        assert first == same != other, name


@pytest.mark.slow
def test_an_earlier_runs_adapters_keep_the_model_that_they_belong_to(stage_3, tmp_path):
    weights = tmp_path / "rlmf_weights"
    stage_3(*WARM)
    model = (weights / "GELI_llama_sft" / "model.safetensors").read_bytes()
    for number, more in ((1, (*WARM, "--sft_steps", 2)), (2, ["--train"])):  # another warm start, then none
        stage_3(*more)
        aside = weights / f"GELI_llama.earlier-{number}"
        recorded = json.loads((aside / "GELI_llama_2" / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert recorded == str((aside / "GELI_llama_sft").resolve())
        assert ((aside / "GELI_llama_sft" / "model.safetensors").read_bytes() == model) == (number == 1)
    assert not (weights / "GELI_llama_sft").exists()
    (weights / "GELI_llama_2").rename(weights / "GELI_llama_9")
    (aside / "GELI_llama_2").rename(weights / "GELI_llama_10")
    assert "which is not there: put it back" in stage_3("--val", check=2).stderr


def test_losses_are_logged_and_wandbs_steps_only_increase(stage_3, monkeypatch):
    logged = []
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb.Run, "log", lambda self, values, step=None: logged.append((step, set(values))))
    stage_3(*WARM)
    assert logged.pop() == (None, {"report/training"})  # the picture, at wandb's own next step
    assert [step for step, _ in logged] == list(range(1, 6))
    assert all(keys == {"sft/loss"} for _, keys in logged[:3])
    assert all("ppo/kl" in keys for _, keys in logged[3:])


def test_a_lower_precision_is_kept(stage_3, tmp_path):
    stage_3(*WARM, "--dtype", "bfloat16", "--steps", 1)
    assert json.loads((tmp_path / "rlmf_weights/GELI_llama_sft/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.slow
def test_no_text_is_left_behind(sample, tiny, tmp_path):
    """No file at all where TRL and the libraries below it keep theirs."""
    places = {name: tmp_path / name for name in ("TMPDIR", "HF_HOME", "XDG_CACHE_HOME")}
    for place in places.values():
        place.mkdir()
    run_script(
        "train_rl_GELI.py", *WARM, "--rf_model", "base", "--data_dir", sample, "--output_dir", tmp_path / "out",
        "--model_name", tiny / "llama", "--batch_size", 2, "--context_turns", 2,
        **{name: str(place) for name, place in places.items()}, WANDB_MODE="offline",
    )  # fmt: skip
    assert (tmp_path / "out/rlmf_weights/GELI_llama_sft").is_dir()
    found = [path for place in places.values() for path in place.rglob("*") if path.is_file()]
    assert not [path for path in found if "wandb" not in path.parts]  # its logs are searched in test_privacy.py


def test_what_cannot_be_is_refused_before_any_work(stage_3, sample, tmp_path):
    encoder_decoder = small_model("t5", tmp_path / "t5", sample)
    refused = {
        ("--train", "--model_name", encoder_decoder): "TRL trains decoder-only models",
        ("--val",): "--sft_steps has no effect without --train",
        ("--train", "--ppo_off"): "--ppo_off updates nothing",
    }
    for options, message in refused.items():
        result = stage_3("--sft_steps", 2, *options, check=2)
        assert message in result.stderr and result.stderr.count("\n") == 1
    assert "at least 0 is expected" in stage_3("--train", "--sft_steps", -1, check=2).stderr
    assert not (tmp_path / "rlmf_weights").exists() and not (tmp_path / "cache").exists()
    wrong = stage_3("--train", "--sft_steps", 9, "--sft_learning_rate", 1e30, check=2).stderr
    assert "try a lower --sft_learning_rate" in wrong
    assert not (tmp_path / "rlmf_weights" / "GELI_llama_sft").exists()
