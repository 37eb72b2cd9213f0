"""What the first hour of a new user depends on: presets, dead rewards, instructions, messages, files' modes, cards."""

import json
import os
import re

import numpy as np
import pytest
from conftest import call_script, run_script, with_sizes
from no_pictures import quick_commands
from safetensors.torch import load_file
from small_models import chat_model, write_head

import train_reward_GELI
import train_reward_LI_only
import train_rl_GELI
from geli.data.messages import INSTRUCTION
from geli.heads import load_reward_head, save_reward_head
from geli.nets.policy import trained_as
from geli.run.options import flat

QUICK = ("--context_turns", 2, "--train_size", 6, "--small_model_shrink", "--val", "--no_cache")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Without wandb and pictures, and with short responses."""
    with quick_commands(min_new_tokens=4, max_new_tokens=8):
        yield


@pytest.fixture(scope="module")
def common(sample, tmp_path_factory):
    """Data and an output folder."""
    return ("--data_dir", sample, "--output_dir", tmp_path_factory.mktemp("out"))


@pytest.fixture
def stage_3(common, tiny):
    def stage_3(*more, model=tiny / "llama", check=0):
        sized = with_sizes(more, batch_size=4, val_prompts=4)
        return call_script(
            "train_rl_GELI.py", "--model_name", model, *sized, "--context_turns", 2, *common, check=check
        )

    return stage_3


def constant_head(tiny, folder, value):
    """A head whose rewards are all `value`."""
    path = write_head(folder, tiny / "bart", "small_model_shrink", reward_class="overall_affect")
    head = load_reward_head(path)
    head.init_constant(value)
    save_reward_head(head, path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Presets


def test_the_small_preset_of_stages_1_and_2_is_recorded_and_what_is_given_wins(common, tiny):
    for module, words in ((train_reward_LI_only, []), (train_reward_GELI, ["--train"])):
        published, small = (flat(module.parse_options([*words, *more])) for more in ([], ["--preset", "small"]))
        changed = {name for name in small if small[name] != published[name]}
        assert {"preset", "context_turns", "epochs"} < changed <= {
            "preset", "context_turns", "epochs", "learning_rate", "batch_size"
        }  # fmt: skip
        given = flat(module.parse_options([*words, "--preset", "small", "--epochs", "8"]))
        assert given == {**small, "epochs": 8}
    with_li = train_reward_GELI.parse_options("--train --preset small --affect_path li".split())
    assert with_li.training.loss_scale == "normalized"  # GE alone has nothing to weigh
    options = (
        "--preset",
        "small",
        *QUICK,
        "--epochs",
        1,
        "--lang_model_path",
        tiny / "bart",
        "--run_name",
        "li",
        *common,
    )
    printed = call_script("train_reward_LI_only.py", *options).stdout
    record = json.loads(next(common[-1].glob("*/reward1_li.json")).read_text())
    assert record["arguments"]["preset"] == "small" and record["arguments"]["learning_rate"] == 1e-4
    assert printed.index("Run li, in ") < printed.index("Stage 1 (LI), run li") < printed.index(record["verdict"])


# ---------------------------------------------------------------------------------------------------------------------
# Dead rewards


@pytest.mark.parametrize(("value", "words"), [(0.4, "constant (mean 0.4"), (0.9999, "saturated at the end of tanh's")])
def test_a_head_with_constant_rewards_ends_stage_3_before_its_first_step(value, words, stage_3, tiny, tmp_path, common):
    head = constant_head(tiny, tmp_path, value)
    name = f"dead-{value}"
    stopped = stage_3("--train", "--val", "--steps", 1, "--reward_path", head, "--exp_name", name, check=2)
    assert f"different answers are {words}" in stopped.stderr and "--allow_constant_reward" in stopped.stderr
    assert stopped.stderr.count("\n") == 1 and not list(common[-1].glob(f"rlmf_weights/{name}*"))
    going_on = ("--reward_path", head, "--exp_name", name, "--allow_constant_reward")
    stage_3("--train", "--steps", 1, *going_on)
    assert list(common[-1].glob(f"rlmf_weights/{name}_llama_1"))


def test_a_function_that_gives_one_number_ends_stage_3_after_the_first_evaluation(stage_3, tmp_path, monkeypatch):
    (tmp_path / "dead_reward.py").write_text("def score(prompts, responses):\n    return [0.5] * len(responses)\n")
    monkeypatch.chdir(tmp_path)
    words = ("--train", "--steps", 1, "--reward_function", "dead_reward:score", "--exp_name", "function")
    assert "8 different answers are constant (mean 0.5" in stage_3(*words, "--val", check=2).stderr
    stage_3(*words)  # without --val nothing is known of it


def test_scores_out_of_a_heads_reach_are_told_before_training(common, tiny):
    def said(*more):
        options = ("--train", *QUICK, "--epochs", 1, "--lang_model_path", tiny / "bart", *more, *common)
        return call_script("train_reward_GELI.py", *options).stdout

    warned = said("--ep_len", "actual")
    words = r"Warning: --ep_len actual: 100% of the scores need .* --small_model_shrink cannot give: [4-9]\.\d in the"
    assert re.search(words, warned) and "--ep_len above" in warned
    assert "Warning" not in said()


# ---------------------------------------------------------------------------------------------------------------------
# Instructions


@pytest.mark.parametrize("form", ["raw", "chat"])
def test_an_instruction_is_recorded_and_used(form, stage_3, tiny, tmp_path, common, monkeypatch):
    model = chat_model(tiny / "llama", tmp_path / "llama") if form == "chat" else tiny / "llama"
    (tmp_path / "support.txt").write_text("You help customers of a bank.\n")
    told, name = "You help customers of a bank.", f"told-{form}"
    more = ("--prompt_format", form, "--exp_name", name, "--reward", "random")
    read, tokenize = [], train_rl_GELI.Policy.tokenize

    def reading(self, prompts):
        ids, mask = tokenize(self, prompts)
        read.extend(self.tokenizer.batch_decode(ids, skip_special_tokens=True))
        return ids, mask

    monkeypatch.setattr(train_rl_GELI.Policy, "tokenize", reading)
    stage_3("--train", "--generate", "--steps", 1, *more, "--instruction", tmp_path / "support.txt", model=model)
    assert read and all(told in text and "casual" not in text for text in read)
    saved = common[-1] / "rlmf_weights" / f"{name}_llama_1"
    assert trained_as(saved).instruction == told and told in (saved / "README.md").read_text()
    assert json.loads((saved.parent / f"{name}_llama.json").read_text())["arguments"]["instruction"] == told
    read.clear()
    stage_3("--val", "--exp_name", name, "--reward", "random", model=model)  # without the option
    assert read and all(told in text for text in read)
    other = ("--val", "--exp_name", name, "--reward", "random", "--instruction", "Be rude.")
    assert "--instruction Be rude.: " in stage_3(*other, model=model, check=2).stderr
    stage_3("--val", "--rf_model", "base", "--reward", "random", "--exp_name", "base", model=model)
    assert INSTRUCTION[:40] in read[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def test_a_path_that_does_not_exist_is_not_asked_for_on_the_hub(common, tiny, stage_3):
    near = f"expected a model's folder, found none; the folders in {tiny}: bart, llama\n"
    refused = stage_3("--train", "--reward", "random", model=tiny / "lama", check=2)
    assert refused.stderr.endswith(f"--model_name {tiny / 'lama'}: {near}") and "Read " not in refused.stdout
    for script, *words in (["train_reward_LI_only.py"], ["train_reward_GELI.py", "--train"]):
        refused = call_script(script, *words, "--lang_model_path", tiny / "brat", *common, check=2)
        assert refused.stderr.endswith(f"--lang_model_path {tiny / 'brat'}: {near}") and "Read " not in refused.stdout


def test_a_relative_path_beside_a_folder_that_is_here(tmp_path, monkeypatch, common):
    (tmp_path / "sample_models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    options = ("--train", "--reward", "random", "--model_name", "sample_models/lama", *common)
    assert "the folders in sample_models: llama\n" in call_script("train_rl_GELI.py", *options, check=2).stderr
    options = ("--train", "--reward", "random", "--model_name", "nobody/nothing", *common)
    error = call_script("train_rl_GELI.py", *options, check=2).stderr
    assert "run `hf download nobody/nothing` where there is a network, or name a folder" in error


def test_generate_alone_and_a_stage_2_run_as_affect_path(stage_3, common, tiny):
    error = stage_3("--generate", "--exp_name", "none", check=2).stderr
    assert "--val or --generate without --train: expected a checkpoint" in error and "--rf_model base" in error
    ge = ("--train", *QUICK, "--epochs", 1, "--lang_model_path", tiny / "bart", "--run_name", "ge", *common)
    call_script("train_reward_GELI.py", *ge)
    error = call_script("train_reward_GELI.py", "--train", "--affect_path", "ge", *common, check=2).stderr
    assert re.search("ge: expected a run name .* found only .*reward1_ge, which is of another stage,", error)


def test_a_corpus_whose_models_were_interrupted_is_gone_on_with(tmp_path, sample, monkeypatch):
    from tools import sample_candor

    asked = []
    monkeypatch.setattr(sample_candor.subprocess, "run", lambda command, check: asked.append(command) or StoppedProcess)
    words = (tmp_path / "made", "--conversations", 2, "--tiny")
    printed = call_script("tools/sample_candor.py", *words).stdout
    assert "Training bart and llama on it" in printed and "--only" not in asked[-1]
    (tmp_path / "made_models" / "bart").mkdir(parents=True)
    printed = call_script("tools/sample_candor.py", *words).stdout
    assert "has a sample corpus already" in printed and asked[-1][-2:] == ["--only", "llama"]
    (tmp_path / "made_models" / "llama").mkdir()
    call_script("tools/sample_candor.py", *words)
    assert len(asked) == 2
    error = call_script("tools/sample_candor.py", *words[:3], check=2).stderr
    assert "expected a new or empty folder" in error


class StoppedProcess:
    returncode = 0


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_models_and_reports_are_as_the_umask_says_and_text_is_for_its_owner(stage_3, common, tiny):
    before = os.umask(0o022)
    try:
        options = ("--train", *QUICK, "--epochs", 1, "--lang_model_path", tiny / "bart", *common, "--unfreeze")
        call_script("train_reward_GELI.py", *options, "--run_name", "shared")
        call_script("train_reward_GELI.py", *options, "--run_name", "quoted", "--log_text")
        stage_3("--train", "--generate", "--steps", 1, "--reward", "random", "--exp_name", "modes")
    finally:
        os.umask(before)
    folder, weights = next(common[-1].glob("baselines_*")), common[-1] / "rlmf_weights"
    names = (
        "reward1_shared",
        "report_shared.html",
        "lang_model_shared/model.safetensors",
        "val_turn_rewards_shared.csv",
    )
    shared = [
        *(folder / name for name in names),
        *(weights / "modes_llama_1").iterdir(),
        weights / "modes_llama_report.html",
    ]
    assert {path.name: path.stat().st_mode & 0o777 for path in shared} == {path.name: 0o644 for path in shared}
    private = [folder / "report_quoted.html", weights / "modes_llama_responses.csv"]
    assert [path.stat().st_mode & 0o777 for path in private] == [0o600, 0o600]


def test_an_adapters_readme_is_a_model_card(stage_3, common, tiny, monkeypatch):
    stage_3("--train", "--val", "--steps", 2, "--save_steps", 1, "--reward", "random", "--exp_name", "card")
    first, last = ((common[-1] / "rlmf_weights" / f"card_llama_{n}" / "README.md").read_text() for n in (1, 2))
    record = json.loads((common[-1] / "rlmf_weights" / "card_llama.json").read_text())
    for card in (first, last):
        assert card.startswith("---\nlibrary_name: peft\ntags:") and f"A LoRA adapter of `{tiny / 'llama'}`" in card
        for row in ("| reward | random |", "| data | candor |", "| conversations | 40 |", "| --steps | 2 |"):
            assert row in card, row
        assert "PeftModel.from_pretrained(" in card and "CANDOR's terms" in card and "--output_dir" not in card
    assert "| score_mean, step 1 of training | " in first and f"| verdict | {record['verdict']} |" in last
    monkeypatch.chdir(common[-1])
    found: dict = {}
    exec(re.search(r"```python\n(.*?)```", last, re.DOTALL)[1], found)
    weights = load_file(common[-1] / "rlmf_weights" / "card_llama_2" / "adapter_model.safetensors")
    assert len(weights) and found["policy"].peft_config["default"].r == 16


@pytest.mark.slow
def test_held_out_text_is_not_printed_into_a_file(common, tiny):
    options = ("--val", "--rf_model", "base", "--reward", "random", "--model_name", tiny / "llama", *common)
    more = ("--val_prompts", 2, "--batch_size", 2, "--max_new_tokens", 8, "--min_new_tokens", 4, "--context_turns", 2)
    quiet, told = (run_script("train_rl_GELI.py", *options, *more, *words).stdout for words in ([], ["--log_text"]))
    assert "human:" not in quiet and "human:" in told and "-e-" not in quiet and "The reference policy alone" in quiet
    assert np.isfinite(
        json.loads((common[-1] / "rlmf_weights" / "GELI_llama_base.json").read_text())["metrics"]["before"]["kl"]
    )
