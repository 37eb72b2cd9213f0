"""Options of stage 3 for other policies and rewards: chat form, reward and gold functions, presets."""

import json
from dataclasses import replace

import pandas as pd
import pytest
from conftest import call_script
from no_pictures import without_pictures
from safetensors import safe_open
from small_models import chat_model

import train_rl_GELI
from geli.nets.policy import saved_prompt_format
from models import PPO_PRESETS

FUNCTIONS = """
def words(prompts, responses):
    return [len(response.split()) for response in responses]

def questions(prompts, responses):
    assert all(prompt.turns is not None for prompt in prompts)
    return [float("?" in response) for response in responses]

def one_too_few(prompts, responses):
    return [0.0] * (len(responses) - 1)

def text(prompts, responses):
    return responses
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without wandb and pictures, and with short responses."""
    parse = train_rl_GELI.parse_options

    def parse_short(argv=None):
        options = parse(argv)
        return replace(options, ppo=replace(options.ppo, min_new_tokens=4, max_new_tokens=8))

    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(train_rl_GELI, "parse_options", parse_short)
    without_pictures(monkeypatch)


@pytest.fixture(scope="module")
def chat_llama(tiny, tmp_path_factory):
    """The small Llama with a chat template."""
    return chat_model(tiny / "llama", tmp_path_factory.mktemp("chat") / "llama")


@pytest.fixture
def stage_3(sample, tmp_path, monkeypatch):
    """(model, options) -> what stage 3 printed, in a folder that has `functions.py`."""
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)

    def stage_3(model, *more, check=0):
        options = ("--data_dir", sample, "--output_dir", tmp_path, "--model_name", model, "--context_turns", 3)
        sizes = ("--steps", 2, "--batch_size", 4, "--val_prompts", 4)
        return call_script("train_rl_GELI.py", *options, *sizes, *more, check=check)

    return stage_3


def test_chat_form_is_recorded_and_followed_by_a_later_evaluation(stage_3, chat_llama, tmp_path):
    stage_3(chat_llama, "--train", "--val", "--reward", "random", "--prompt_format", "chat")
    weights = tmp_path / "rlmf_weights"
    with safe_open(weights / "GELI_llama_2" / "value_head.safetensors", "pt") as file:
        assert file.metadata() == {"prompt_format": "chat"}
    trained = json.loads((weights / "GELI_llama.json").read_text())["metrics"]
    stage_3(chat_llama, "--val", "--reward", "random")  # without the option
    again = json.loads((weights / "GELI_llama_2_val.json").read_text())["metrics"]
    assert again["after"]["response_words"] == trained["after"]["response_words"]
    refused = stage_3(chat_llama, "--val", "--reward", "random", "--prompt_format", "raw", check=2)
    assert "--prompt_format raw:" in refused.stderr and "was trained with chat" in refused.stderr


def test_the_prompt_format_is_raw_by_default(stage_3, chat_llama, tiny, tmp_path):
    stage_3(tiny / "llama", "--train", "--reward", "random")
    assert saved_prompt_format(tmp_path / "rlmf_weights" / "GELI_llama_2") == "raw"
    refused = stage_3(tiny / "llama", "--train", "--reward", "random", "--prompt_format", "chat", check=2)
    assert "has no chat template; use raw" in refused.stderr


@pytest.mark.parametrize("algo", ["rloo", "grpo"])
def test_trls_trainers_and_sft_use_the_chat_form(algo, stage_3, chat_llama, tmp_path):
    more = ("--num_generations", 2, "--trl", "max_completion_length=8", "--sft_steps", 1)
    stage_3(
        chat_llama, "--train", "--algo", algo, "--reward_function", "functions:words", *more, "--prompt_format", "chat"
    )
    steps = pd.read_csv(tmp_path / "rlmf_weights" / "GELI_llama_steps.csv")
    assert len(steps) == 2 and (steps["score_mean"] > 0).all()


def test_a_function_is_the_reward_and_another_is_only_measured(stage_3, tiny, tmp_path):
    functions = ("--reward_function", "functions:words", "--gold_function", "functions:questions")
    printed = stage_3(tiny / "llama", "--train", "--val", "--generate", *functions).stdout
    record = json.loads((tmp_path / "rlmf_weights" / "GELI_llama.json").read_text())["metrics"]
    responses = pd.read_csv(tmp_path / "rlmf_weights" / "GELI_llama_responses.csv", keep_default_na=False)
    for when, column in (("before", "base"), ("after", "tuned"), ("human", "human")):
        words = responses[column].str.split().str.len().mean()
        assert record[when]["reward"] == pytest.approx(words)
        assert record[when]["gold"] == pytest.approx(responses[column].str.contains("?", regex=False).mean())
    steps = pd.read_csv(tmp_path / "rlmf_weights" / "GELI_llama_steps.csv")
    assert steps["gold_mean"].between(0, 1).all() and "reward functions:words" in printed


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("functions:nothing", "expected MODULE:FUNCTION on Python's path"),
        ("no_such_module:f", "expected MODULE:FUNCTION on Python's path: No module named"),
        ("functions:one_too_few", "expected 4 numbers, one a response, found shape (3,)"),
        ("functions:text", "expected numbers, found something else"),
    ],
)
def test_a_function_that_cannot_be_used_is_one_clear_error(name, says, stage_3, tiny):
    refused = stage_3(tiny / "llama", "--val", "--rf_model", "base", "--reward_function", name, check=2)
    assert says in refused.stderr and name in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_a_preset_sets_the_defaults_of_other_options(monkeypatch):
    monkeypatch.undo()
    published, small = (train_rl_GELI.parse_options(["--train", *more]) for more in ([], ["--preset", "small"]))
    assert published.ppo == PPO_PRESETS[None] and small.ppo == PPO_PRESETS["small"] != published.ppo
    given = train_rl_GELI.parse_options(["--train", "--preset", "small", "--learning_rate", "1.4e-5"])
    assert given.ppo.learning_rate == 1.4e-5 and given.ppo.beta == PPO_PRESETS["small"].beta
    with pytest.raises(SystemExit):
        train_rl_GELI.parse_options(["--train", "--preset", "huge"])


def test_training_ends_at_a_kl(stage_3, tiny, tmp_path):
    """With a threshold that the second step reaches, the run ends there and keeps that policy."""
    options = ("--train", "--reward_function", "functions:words", "--learning_rate", 0.05, "--steps", 6)
    stage_3(tiny / "llama", *options, "--stop_kl", 1e-6)
    steps = pd.read_csv(tmp_path / "rlmf_weights" / "GELI_llama_steps.csv")
    last = len(steps)
    assert 2 <= last < 6 and steps["kl"].iloc[-2:].mean() >= 1e-6 > steps["kl"].iloc[0]
    assert (tmp_path / "rlmf_weights" / f"GELI_llama_{last}").is_dir()
    printed = stage_3(tiny / "llama", "--train", "--algo", "grpo", "--stop_kl", 1, check=2)
    assert "--stop_kl is for --algo ppo" in printed.stderr
