"""Options of stage 3 for other policies and rewards: chat form, reward and gold functions, presets."""

import json
from dataclasses import fields, replace
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import call_script, with_sizes
from no_pictures import without_pictures
from safetensors import safe_open
from small_models import chat_model

import train_rl_GELI
from geli.data.messages import INSTRUCTION
from geli.nets.policy import TrainedAs, trained_as
from geli.run.lock import _difference
from geli.run.options import flat
from models import PPO_PRESETS, PPOConfig

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
        sized = with_sizes(more, steps=2, batch_size=4, val_prompts=4)
        return call_script("train_rl_GELI.py", *options, *sized, check=check)

    return stage_3


def test_chat_form_is_recorded_and_followed_by_a_later_evaluation(stage_3, chat_llama, tmp_path):
    stage_3(chat_llama, "--train", "--val", "--reward", "random", "--prompt_format", "chat")
    weights = tmp_path / "rlmf_weights"
    with safe_open(weights / "GELI_llama_2" / "value_head.safetensors", "pt") as file:
        recorded = json.loads(file.metadata()["policy"])
    assert recorded == {"prompt_format": "chat", "max_new_tokens": 8, "instruction": INSTRUCTION}
    trained = json.loads((weights / "GELI_llama.json").read_text())["metrics"]
    stage_3(chat_llama, "--val", "--reward", "random")  # without the option
    again = json.loads((weights / "GELI_llama_2_val.json").read_text())["metrics"]
    assert again["after"]["response_words"] == trained["after"]["response_words"]
    refused = stage_3(chat_llama, "--val", "--reward", "random", "--prompt_format", "raw", check=2)
    assert "--prompt_format raw:" in refused.stderr and "was trained with chat" in refused.stderr


def test_the_prompt_format_is_raw_by_default(stage_3, chat_llama, tiny, tmp_path):
    stage_3(tiny / "llama", "--train", "--reward", "random")
    assert trained_as(tmp_path / "rlmf_weights" / "GELI_llama_2") == TrainedAs("raw", 8)
    refused = stage_3(tiny / "llama", "--train", "--reward", "random", "--prompt_format", "chat", check=2)
    assert "has no chat template; use raw" in refused.stderr


@pytest.mark.parametrize("algo", ["rloo", "grpo"])
def test_trls_trainers_and_sft_use_the_chat_form(algo, stage_3, chat_llama, tmp_path):
    more = ("--num_generations", 2, "--sft_steps", 1)
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
    assert (published.policy.adapter, small.policy.adapter) == ((16, 32, 0, None), (4, 8, 1, None))
    words = ["--train", "--preset", "small", "--learning_rate", "1.4e-5", "--lora_r", "7"]
    given = train_rl_GELI.parse_options(words)
    assert given.ppo == replace(PPO_PRESETS["small"], learning_rate=1.4e-5) and given.policy.adapter == (7, 8, 1, None)
    with pytest.raises(SystemExit):
        train_rl_GELI.parse_options(["--train", "--preset", "huge"])


PPO_SETTINGS = {  # another value for each
    "--mini_batch_size": 2,
    "--gradient_accumulation_steps": 1,
    "--ppo_epochs": 2,
    "--init_kl_coef": 0.3,
    "--target": 3,
    "--horizon": 500,
    "--gamma": 0.9,
    "--lam": 0.5,
    "--cliprange": 0.1,
    "--cliprange_value": 0.3,
    "--vf_coef": 0.2,
    "--target_kl": 0.5,
    "--optimizer": "adamw",
    "--critic": "ridge",
    "--num_generations": 2,
    "--min_new_tokens": 5,
    "--max_new_tokens": 200,
}
PPO_SWITCHES = ("--no_early_stopping", "--exact_kl", "--fixed_kl_coef")


def test_every_setting_of_ppo_is_an_option_that_is_recorded_and_seen_by_resume(monkeypatch):
    monkeypatch.undo()
    plain = flat(train_rl_GELI.parse_options(["--train"]))
    assert {field.name for field in fields(PPOConfig)} <= set(plain)
    for name, value in {**PPO_SETTINGS, **dict.fromkeys(PPO_SWITCHES)}.items():
        words = [name] if value is None else [name, str(value)]
        options = train_rl_GELI.parse_options(["--train", *words])
        changed = {option: value for option, value in flat(options).items() if value != plain[option]}
        assert changed == {name[2:]: True if value is None else value}
        assert getattr(options.ppo, name[2:]) == changed[name[2:]]
        assert _difference(plain, flat(options)) == f"{name} {plain[name[2:]]}, not {changed[name[2:]]}"


def test_ppo_trains_by_its_options_and_a_checkpoint_records_how_long_replies_are(stage_3, tiny, tmp_path, monkeypatch):
    monkeypatch.undo()  # no short responses but those of the options
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    without_pictures(monkeypatch)
    options = ("--min_new_tokens", 3, "--max_new_tokens", 3, "--ppo_epochs", 3, "--gradient_accumulation_steps", 1)
    options += ("--mini_batch_size", 2, "--init_kl_coef", 0.3, "--target", 2, "--horizon", 10)
    stage_3(tiny / "llama", "--train", "--reward", "random", *options)
    weights = tmp_path / "rlmf_weights"
    steps = pd.read_csv(weights / "GELI_llama_steps.csv")
    assert steps["optimizer_steps"].tolist() == [6, 6] and steps["response_length_mean"].max() <= 3
    # the KL is 0 at first, the error is cut to -0.2, and 4 of 10 responses have passed
    assert steps["beta"].tolist() == pytest.approx([0.3, 0.3 * (1 - 0.2 * 4 / 10)])
    assert json.loads((weights / "GELI_llama.json").read_text())["arguments"]["init_kl_coef"] == 0.3
    assert trained_as(weights / "GELI_llama_2").max_new_tokens == 3
    too_many = ("--train", "--reward", "random", "--max_new_tokens", 1 << 16)
    assert "room for a prompt besides" in stage_3(tiny / "llama", *too_many, check=2).stderr


def test_a_fixed_coefficient_and_a_small_adapter_of_the_last_layer(stage_3, tiny, tmp_path):
    words = "--train --reward random --steps 3 --num_generations 2 --exact_kl --fixed_kl_coef --init_kl_coef 0.4"
    more = "--critic ridge --optimizer adamw --learning_rate 5e-3 --lora_r 2 --lora_alpha 6 --num_layers_unfrozen 1"
    stage_3(tiny / "llama", *words.split(), *more.split(), "--batch_size", 4)
    weights = tmp_path / "rlmf_weights"
    steps = pd.read_csv(weights / "GELI_llama_steps.csv")
    assert steps["beta"].tolist() == [0.4] * 3 and abs(steps["kl"].iloc[0]) < 1e-6 < steps["kl"].iloc[2]
    adapter = json.loads((weights / "GELI_llama_3" / "adapter_config.json").read_text())
    layers = json.loads((tiny / "llama" / "config.json").read_text())["num_hidden_layers"]
    assert (adapter["r"], adapter["lora_alpha"], adapter["layers_to_transform"]) == (2, 6, [layers - 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--train --gamma 1.5", "--gamma: a number from 0 to 1 is expected, not '1.5'"),
        ("--train --cliprange 0", "--cliprange: a number above 0 is expected, not '0'"),
        ("--train --ppo_epochs 0", "--ppo_epochs: a whole number of at least 1 is expected"),
        ("--train --min_new_tokens 9 --max_new_tokens 8", "--min_new_tokens 9: expected at most --max_new_tokens"),
        ("--train --horizon 4 --batch_size 20", "--horizon 4: expected more than a fifth of --batch_size 20"),
        ("--train --algo distill", "--algo distill teaches the best of --num_generations responses to a prompt"),
        ("--train --target_kl 2 --no_early_stopping", "--target_kl has no effect with --no_early_stopping"),
        ("--train --algo grpo --init_kl_coef 0.1", "--init_kl_coef is for --algo ppo"),
        ("--train --algo grpo --exact_kl", "--exact_kl is for --algo ppo"),
        ("--train --fixed_kl_coef --horizon 999", "--horizon has no effect with --fixed_kl_coef"),
        ("--val --lora_r 8", "--lora_r has no effect without training"),
        ("--train --algo rloo --vf_coef 0.1", "--vf_coef is for --algo ppo"),  # though that is its default
        ("--train --algo rloo --no_early_stopping", "--no_early_stopping is for --algo ppo"),
        ("--train --algo grpo --mini_batch_size 2", "--mini_batch_size has no effect without PPO"),
        ("--train --algo grpo --trl max_completion_length=9", "give it as --max_new_tokens"),
        ("--train --ppo_off --lam 0.9", "--lam has no effect with --ppo_off"),
        ("--train --ppo_off --learning_rate 1e-4", "--learning_rate has no effect with --ppo_off"),
        ("--val --ppo_off", "--ppo_off has no effect without RL, which takes --train"),
        ("--val --steps 3", "--steps has no effect without RL"),
        ("--train --val --rf_model base --save_steps 3", "--save_steps has no effect without RL"),
        ("--val --resume", "--resume has no effect without --train"),
        ("--train --sft_learning_rate 1e-3", "--sft_learning_rate has no effect without --sft_steps"),
        ("--train --val_prompts 9", "--val_prompts has no effect without --val or --generate"),
        ("--train --algo grpo --gold_function a:b", "--gold_function has no effect without PPO, --val or --generate"),
        ("--generate --reward_path x", "--reward_path has no effect where nothing is scored"),
        ("--generate --rf_model GE", "--rf_model has no effect where nothing is scored"),
        ("--train --reward random --lang_model_path x", "--lang_model_path has no effect where no reward head is used"),
        ("--train --reward_function a:b --max_length 9", "--max_length has no effect where no reward head is used"),
        ("--train --reward random --reward_path x", "--reward random and --reward_path ask for different rewards"),
        ("--train --reward random --rf_model GELI", "--reward random and --rf_model GELI ask for different rewards"),
        ("--train --rf_model GE --reward_path x", "--rf_model GE and --reward_path ask for different rewards"),
        ("--train --reward_function a:b --reward_path x", "--reward_path and --reward_function ask for"),
        ("--train --reward_function a:b --reward redistributed_reward", "--reward redistributed_reward and --rew"),
    ],
)
def test_an_option_is_used_or_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_rl_GELI.parse_options(arguments.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        ("--train", ("newest", "GELI")),
        ("--train --reward redistributed_reward --rf_model GELI", ("newest", "GELI")),
        ("--train --rf_model VFRRD_sync", ("newest", "VFRRD_sync")),
        ("--val --rf_model base", ("newest", "GELI")),
        ("--val --rf_model base --reward_path x", ("head", "x")),
        ("--train --reward redistributed_reward --reward_path x", ("head", "x")),
        ("--train --reward random", ("random", "random")),
        ("--train --reward_function a:b", ("function", "a:b")),
    ],
)
def test_the_options_of_the_reward_come_to_one(arguments, chosen):
    assert train_rl_GELI.parse_options(arguments.split()).reward.chosen == chosen


@pytest.mark.parametrize(
    ("kls", "finished"), [([], False), ([1.5], False), ([0.5, 1.5], True), ([9.0, 0.5, 1.0], False)]
)
def test_a_resumed_run_knows_that_it_has_reached_its_kl(kls, finished):
    recorder = SimpleNamespace(rows=[{"step": i, "kl": kl} for i, kl in enumerate(kls)])
    options = SimpleNamespace(rl=SimpleNamespace(stop_kl=1.0, algo=""), run=SimpleNamespace(seed=0))
    assert train_rl_GELI.PPOTraining(None, [], recorder, options).finished == finished


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
