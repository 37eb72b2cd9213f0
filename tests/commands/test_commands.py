"""The three commands as published, end to end: what they write, print, repeat and refuse."""

import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT, call_script, environment_of_its_own, run_script
from peft import PeftModel
from transformers import AutoModelForCausalLM

from geli.heads import encoder_of_head, load_reward_head
from geli.nets.encoder import load_encoder

LI_FOLDER = (
    "SINGLE_INDEX_reward_function_convo_overall_affect_contra_False_shrink_False_curriculum_False"
    "_curriculum_exposureFalse"
)
GELI_FOLDER = "visual_feedback_baselines_convo_overall_affect_baseline_RRD_K_160"
GE_FOLDER = "baselines_convo_overall_affect_baseline_RRD_K_160"

# the published commands, word for word
STAGE_1 = (
    "--reward_class overall_affect --model convo --batch_size 32 --K 32 --train_size 500 --val --small_model_shrink"
)
STAGE_2 = (
    "--redist_type RRD --reward_class overall_affect --model convo --batch_size 1 --K 160 --train_size 100 --train "
    "--val --small_model_shrink"
)
STAGE_3 = (
    "--model_name llama --exp_name GELI --reward redistributed_reward --rf_model GELI --train --val --batch_size 24"
)
QUICK = ("--context_turns", 2, "--learning_rate", 1e-3)
FEW = ("--epochs", 1, "--train_size", 4)  # behind the published words: the last one counts


def stage_1(out, sample, tiny, *more, run=call_script):
    options = (*STAGE_1.split(), "--data_dir", sample, "--output_dir", out, "--lang_model_path", tiny / "bart")
    return run("train_reward_LI_only.py", *options, "--epochs", 1, *QUICK, *more)


def stage_2(out, sample, *more, check=0):
    return call_script(
        "train_reward_GELI.py", *STAGE_2.split(), "--data_dir", sample, "--output_dir", out, *more, check=check
    )


def stage_3(out, sample, tiny, *more):
    words = STAGE_3.replace("--model_name llama", f"--model_name {tiny}/llama").replace("size 24", "size 6").split()
    data = ("--data_dir", sample, "--output_dir", out)
    return call_script("train_rl_GELI.py", *words, "--steps", 2, "--val_prompts", 6, "--generate", *data, *QUICK, *more)


@pytest.fixture(scope="module")
def trained(sample, tiny, tmp_path_factory):
    """The outputs of stages 1 (run li), 2 (runs geli and ge) and 3, and what they printed. wandb runs offline."""
    out = tmp_path_factory.mktemp("out")
    printed = {
        "li": stage_1(out, sample, tiny, "--run_name", "li", run=run_script),  # as a user starts it
        "geli": stage_2(out, sample, "--affect_path", "li", "--run_name", "geli", *QUICK),
        "ge": stage_2(out, sample, "--lang_model_path", tiny / "bart", "--run_name", "ge", *QUICK),
        "ppo": stage_3(out, sample, tiny),
    }
    return out, printed


@pytest.fixture
def no_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


def record_of(out, run):
    return json.loads(next(out.glob(f"*/reward1_{run}.json")).read_text())


# ---------------------------------------------------------------------------------------------------------------------
# What is written


@pytest.mark.parametrize(("run", "folder"), [("li", LI_FOLDER), ("geli", GELI_FOLDER), ("ge", GE_FOLDER)])
def test_reward_stages_write_the_promised_files(trained, sample, run, folder):
    out, printed = trained
    tables = [f"val_turn_rewards_{run}.csv", f"val_turn_rewards_{run}.png", f"val_returns_{run}.png"]
    for name in (f"reward1_{run}", f"reward1_{run}.json", *tables):
        assert (out / folder / name).is_file() and f"\n    {name}" in printed[run].stdout
    assert f"\n  {out / folder}/\n" in printed[run].stdout and record_of(out, run)["verdict"] in printed[run].stdout
    record = record_of(out, run)
    assert record["seed"] == 0 and record["arguments"]["reward_class"] == "overall_affect"
    assert record["versions"]["torch"] == torch.__version__
    assert record["data"]["conversations"] == 40 and record["data"]["dropped_conversations"] == 0
    assert len(record["training_conversations"]) == 36 and len(record["validation_conversations"]) == 4
    table = pd.read_csv(out / folder / f"val_turn_rewards_{run}.csv")
    assert set(table["conversation_id"]) == set(record["validation_conversations"])
    transcripts = [
        pd.read_csv(sample / c / "transcription" / "transcript_cliffhanger.csv") for c in set(table["conversation_id"])
    ]
    assert len(table) == sum(map(len, transcripts))  # every turn is an agent turn of one of the two trajectories
    assert not list((out / folder).glob(".*"))  # no temporary files remain


def test_stage_1_saves_an_encoder_that_changed_and_its_head_names_it(trained, tiny):
    out, _ = trained
    path = out / LI_FOLDER / "reward1_li"
    name = encoder_of_head(load_reward_head(path).config, path)
    assert name == str(out / LI_FOLDER / "lang_model_li")
    before, after = (load_encoder(str(folder)) for folder in (tiny / "bart", name))
    moved = [
        not torch.equal(a, b) for a, b in zip(before.encoder.parameters(), after.encoder.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) / 2


def test_stage_2_freezes_the_encoder_and_starts_from_stage_1s_head(trained):
    out, _ = trained
    path = out / GELI_FOLDER / "reward1_geli"
    config = load_reward_head(path).config
    assert (config.li, config.redist_type, config.stage) == (True, "RRD", 2)
    assert encoder_of_head(config, path) == str(out / LI_FOLDER / "lang_model_li")
    assert not load_reward_head(out / GE_FOLDER / "reward1_ge").config.li
    metrics = record_of(out, "geli")["metrics"]
    assert metrics["validation"]["ge_loss"] == pytest.approx(metrics["best_ge_loss"])


@pytest.mark.parametrize("run", ["li", "geli", "ge"])
def test_a_reported_validation_loss_is_what_the_table_gives(trained, sample, run):
    out, _ = trained
    table = pd.read_csv(next(out.glob(f"*/val_turn_rewards_{run}.csv")))
    metrics = record_of(out, run)["metrics"]["validation"]
    ge, li = [], []
    for (conversation, user), rows in table.groupby(["conversation_id", "user_id"]):
        survey = pd.read_csv(sample / conversation / "survey.csv").set_index("user_id")
        ge.append((10 * survey.loc[user, "overall_affect"] - 160 * rows["reward"].mean()) ** 2)
        li.append(((rows["reward"] - rows["target"]) ** 2).mean())
    assert metrics["ge_loss"] == pytest.approx(sum(ge) / len(ge), rel=1e-3)
    assert metrics["li_loss"] == pytest.approx(sum(li) / len(li), rel=1e-3)
    assert set(table["target"]) == {0, 1} and ((table["affect"] == "happiness") == (table["target"] == 1)).all()


def test_stage_3_writes_adapters_that_peft_loads_and_names_the_reward_head(trained, tiny):
    out, printed = trained
    folder = out / "rlmf_weights"
    assert f"Reward head: {out / GELI_FOLDER / 'reward1_geli'}" in printed["ppo"].stdout
    base = AutoModelForCausalLM.from_pretrained(tiny / "llama")
    adapter = PeftModel.from_pretrained(base, folder / "GELI_llama_2").peft_config["default"]
    assert (adapter.r, adapter.lora_alpha) == (16, 32)
    assert (folder / "GELI_llama_2" / "value_head.safetensors").is_file()
    record = json.loads((folder / "GELI_llama.json").read_text())
    assert record["metrics"]["before"]["kl"] == pytest.approx(0, abs=1e-4)
    assert abs(record["metrics"]["after"]["kl"]) > 1e-4
    steps = pd.read_csv(folder / "GELI_llama_steps.csv")
    assert steps["step"].tolist() == [1, 2]
    assert steps["kl"][0] == pytest.approx(0, abs=1e-4)  # the adapter changes nothing yet
    for column in ("score_mean", "human_score_mean", "beta", "entropy", "policy_clip_fraction", "value_clip_fraction"):
        assert steps[column].notna().all()
    responses = folder / "GELI_llama_responses.csv"
    assert responses.stat().st_mode & 0o077 == 0  # text is for its owner only
    assert set(pd.read_csv(responses)) == {"prompt", "human", "base", "tuned"}
    assert (folder / "GELI_llama_ppo.png").is_file()


def test_wandb_is_offline_and_gets_no_text_or_id(trained, sample):
    out, _ = trained
    table = pd.read_csv(sample / "truth.csv")
    words = pd.read_csv(next(sample.glob("*/transcription/transcript_cliffhanger.csv")))["utterance"]
    secrets = [*table["conversation_id"].unique(), *table["speaker"].unique(), *words[words.str.len() > 20]]
    files = [path for path in (out / "wandb").rglob("*") if path.is_file()]
    assert sum(path.suffix == ".wandb" for path in files) == 4
    for path in files:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path


def test_text_goes_to_wandb_when_asked(trained, sample, tmp_path):
    out, _ = trained
    options = ["--val", "--reward_path", out / GELI_FOLDER / "reward1_geli", "--data_dir", sample, "--log_text"]
    call_script("train_reward_GELI.py", *options, "--output_dir", tmp_path, "--run_name", "logged")
    identity = record_of(tmp_path, "logged")["validation_conversations"][0]
    tables = list((tmp_path / "wandb").rglob("*.table.json"))
    assert any(identity in path.read_text() and "AI: " in path.read_text() for path in tables)


# ---------------------------------------------------------------------------------------------------------------------
# What is repeated


def test_the_same_command_gives_the_same_bytes_whatever_the_order_of_folders(trained, sample, tiny, tmp_path, no_wandb):
    out, _ = trained
    shuffled = tmp_path / "candor"  # other inodes, made in another order
    shuffled.mkdir()
    for folder in sorted(sample.iterdir(), reverse=True):
        if folder.is_dir():
            shutil.copytree(folder, shuffled / folder.name)
    stage_1(tmp_path, shuffled, tiny, "--run_name", "again")
    stage_2(tmp_path, shuffled, "--affect_path", "again", "--run_name", "geli2", *QUICK)
    for folder, first, second in ((LI_FOLDER, "li", "again"), (GELI_FOLDER, "geli", "geli2")):
        files = [root / folder / f"val_turn_rewards_{run}.csv" for root, run in ((out, first), (tmp_path, second))]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert record_of(out, first)["metrics"] == record_of(tmp_path, second)["metrics"]


@pytest.mark.slow
def test_a_second_run_of_stage_3_repeats_the_first_and_moves_its_outputs_aside(trained, sample, tiny, no_wandb):
    out, _ = trained
    weights, aside = out / "rlmf_weights", out / "rlmf_weights" / "GELI_llama.earlier-1"
    first = (weights / "GELI_llama_steps.csv").read_text()
    stage_3(out, sample, tiny)
    assert (aside / "GELI_llama_steps.csv").read_text() == first
    again, before = (pd.read_csv(folder / "GELI_llama_steps.csv") for folder in (weights, aside))
    timed = [column for column in again if column.startswith("seconds_")]
    pd.testing.assert_frame_equal(again.drop(columns=timed), before.drop(columns=timed))
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        paths = [folder / "GELI_llama_2" / name for folder in (weights, aside)]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    shutil.rmtree(aside)
    stage_3(out, sample, tiny, "--seed", 1)
    other = pd.read_csv(weights / "GELI_llama_steps.csv")
    assert (other["score_mean"] != again["score_mean"]).all() and (other["entropy"] != again["entropy"]).all()


def test_a_saved_head_is_evaluated_by_val_alone(trained, sample, no_wandb):
    out, _ = trained
    options = ["--val", "--reward_path", "geli", "--run_name", "evaluated", "--data_dir", sample, "--output_dir", out]
    call_script("train_reward_GELI.py", *options)
    assert record_of(out, "evaluated")["metrics"]["validation"] == record_of(out, "geli")["metrics"]["validation"]


def test_another_encoder_than_the_heads_own_is_refused(trained, sample, tiny):
    out, _ = trained
    options = ["--val", "--reward_path", "geli", "--lang_model_path", tiny / "bart", "--data_dir", sample]
    error = call_script("train_reward_GELI.py", *options, "--output_dir", out, check=2).stderr
    assert "reward1_geli records its own encoder" in error and "lang_model_li: leave it out" in error


def test_val_alone_evaluates_the_newest_checkpoint_and_leaves_the_trainings_record(trained, sample, tiny, no_wandb):
    out, _ = trained
    record = (out / "rlmf_weights" / "GELI_llama.json").read_text()
    seed = json.loads(record)["seed"]  # of held-out prompts
    options = ["--model_name", tiny / "llama", "--val", "--val_prompts", 6, "--batch_size", 6, "--data_dir", sample]
    call_script("train_rl_GELI.py", *options, "--output_dir", out, "--context_turns", 2, "--seed", seed)
    again = json.loads((out / "rlmf_weights" / "GELI_llama_2_val.json").read_text())["metrics"]
    assert again["after"] == json.loads(record)["metrics"]["after"]
    assert (out / "rlmf_weights" / "GELI_llama.json").read_text() == record


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_a_run_name_is_not_used_twice(trained, sample):
    out, _ = trained
    result = stage_2(out, sample, "--affect_path", "li", "--run_name", "geli", check=2)
    assert "--run_name geli" in result.stderr and "choose another" in result.stderr


def test_broken_conversations_are_named_and_stop_nothing(sample, tiny, tmp_path, no_wandb):
    data = tmp_path / "candor"
    shutil.copytree(sample, data)
    intact = next(path for path in sorted(sample.iterdir()) if path.is_dir())

    def change(path, **columns):
        pd.read_csv(path, dtype=str).assign(**columns).to_csv(path, index=False)

    damage = {
        "no-transcript": lambda f: (f / "transcription" / "transcript_cliffhanger.csv").unlink(),
        "no-faces": lambda f: (f / "audio_video_features.csv").unlink(),
        "no-survey": lambda f: (f / "survey.csv").unlink(),
        "empty-folder": lambda f: (shutil.rmtree(f), f.mkdir()),
        "cut-off": lambda f: (f / "transcription" / "transcript_cliffhanger.csv").write_text("turn_id,speaker,sta"),
        "not-text": lambda f: (f / "survey.csv").write_bytes(bytes(range(256))),
        "one-speaker": lambda f: change(f / "transcription" / "transcript_cliffhanger.csv", speaker="u"),
        "lost-faces": lambda f: change(f / "audio_video_features.csv", prob_face_happiness=""),
    }
    for name, break_it in damage.items():
        shutil.copytree(intact, data / name)
        break_it(data / name)
    printed = stage_1(tmp_path, data, tiny, "--run_name", "r", *FEW).stdout
    assert "Read 42 conversations" in printed and "Dropped 6 of 48 conversations:" in printed
    record, faceless = record_of(tmp_path, "r"), {"no-faces", "lost-faces"}
    assert set(record["dropped_conversations"]) == set(damage) - faceless
    assert printed.count("Dropped 2 trajectories: no faces to learn from") == len(faceless)
    for name, reason in record["dropped_conversations"].items():
        assert f"  {name}: {reason}" in printed
    assert len(set(record["dropped_conversations"].values())) >= 5


@pytest.mark.parametrize("script", ["train_reward_LI_only.py", "train_reward_GELI.py", "train_rl_GELI.py"])
def test_without_data_the_error_is_one_line(script, trained, tmp_path):
    out, _ = trained
    train = {"train_reward_LI_only.py": []}.get(script, ["--train"])
    for data in (tmp_path, tmp_path / "nowhere"):
        error = call_script(script, "--data_dir", data, "--output_dir", out, *train, check=2).stderr
        assert error.count("\n") == 1 and "Traceback" not in error
        assert "expected" in error and "sample_candor.py" in error


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train_reward_GELI.py", "", "nothing to do: give --train, --val or both"),
        (
            "train_reward_GELI.py",
            "--train --affect_path nobody",
            "nobody: expected a run name or the path of a reward1_ file",
        ),
        ("train_reward_GELI.py", "--train --lambda 0.5", "--lambda: only LI uses it"),
        ("train_reward_GELI.py", "--val", "evaluates a saved head: name it with --reward_path RUN"),
        ("train_reward_GELI.py", "--train --seed -1", "a whole number from 0 to 2**32 - 1"),
        ("train_reward_GELI.py", "--train --affect_path x --lambda 2", "a number from 0 to 1 is expected, not '2'"),
        ("train_reward_GELI.py", "--train --run_name ../x", "a plain name"),
        ("train_reward_GELI.py", "--train --reward_class you_are_tall", "invalid choice: 'you_are_tall'"),
        ("train_reward_GELI.py", "--train --affect_path x --reward_path y", "--reward_path: is a head to evaluate"),
        ("train_reward_GELI.py", "--val --affect_path x", "--affect_path: nothing is trained: give --train"),
        ("train_reward_GELI.py", "--val --reward_path x --unfreeze", "--unfreeze: nothing is trained: give --train"),
        ("train_reward_LI_only.py", "--K 0", "a whole number of at least 1 is expected, not '0'"),
        ("train_reward_LI_only.py", "--small_model --hard_shrink", "not allowed with argument"),
        ("train_rl_GELI.py", "", "nothing to do: give --train, --val or --generate"),
        ("train_rl_GELI.py", "--train --resume --algo grpo", "--resume is for --algo ppo"),
        ("train_rl_GELI.py", "--train --ppo_off --algo grpo", "--ppo_off is for --algo ppo"),
        ("train_rl_GELI.py", "--train --trl beta=1", "--trl is for --algo rloo or grpo"),
        ("train_rl_GELI.py", "--train --algo grpo --trl report_to=wandb", "it can send conversations elsewhere"),
        (
            "train_rl_GELI.py",
            "--train --rf_model LI",
            "--rf_model LI: expected a reward head *reward_function_*/reward1_RUN",
        ),
        ("tools/sample_candor.py", ".", "expected a new or empty folder"),
        ("tools/sample_candor.py", "out --turns 9", "--turns 9: at least 10 are needed"),
        ("tools/convert_corpus.py", "casino . out", "expected casino_train.json"),
        ("tools/convert_corpus.py", "klingon . out", "invalid choice: 'klingon'"),
    ],
)
def test_mistakes_are_answered_in_one_line(script, arguments, message, tmp_path, monkeypatch):
    (tmp_path / "something").touch()
    monkeypatch.chdir(tmp_path)
    error = call_script(script, *arguments.split(), check=2).stderr
    assert message in error and error.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# --help

COMMANDS = ("train_*.py", "tools/*.py", "experiments/*.py", "apps/*/__main__.py", "apps/chat/forget.py")
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in COMMANDS
    for path in ROOT.glob(pattern)
    if 'if __name__ == "__main__"' in path.read_text()
)
# options that do nothing until they are given
OPTIONAL = {"--affect_path", "--reward_path", "--lang_model_path", "--tiny", "--trl", "--data_dir", "--encoder"}
OPTIONAL |= {"--reward_function", "--gold_function", "--evaluate", "--reward_class", "--truth"}
OPTIONAL |= {"--llm_shares", "--url", "--model", "--folder", "--price"}
# what takes seconds to import; the tools need pandas, but not before they know what to do
SLOW = {"transformers", "peft", "trl", "sklearn", "scipy", "wandb", "matplotlib", "pandas"}


def test_every_app_has_a_command():
    assert len(SCRIPTS) > 15
    apps = {path.parent.name for path in ROOT.glob("apps/*/__init__.py")}
    assert apps == {path.parent.name for path in ROOT.glob("apps/*/__main__.py")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_gives_every_default_and_imports_nothing_slow(script):
    code = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    print("\\nIMPORTED", stop.code, *sorted({name.split(".")[0] for name in sys.modules}))
"""
    command = [sys.executable, "-c", code, str(ROOT / script)]
    environment = environment_of_its_own(COLUMNS="200")
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    text, imported = result.stdout.split("\nIMPORTED ")
    code, *names = imported.split()
    assert code == "0" and "argparse" in names
    reads = ("tools/sample_candor.py", "tools/sample_chats.py", "tools/convert_corpus.py")
    allowed = {"pandas"} if script in reads else set()
    assert not (SLOW - allowed) & set(names)
    entries = text.split("options:")[-1].split("\n  -")[2:]  # the first is --help
    for entry in entries:
        words = entry.split()
        assert len(words) > 2, f"no meaning: {entry}"
        flag = f"-{words[0].strip(',')}"
        assert "default" in entry or flag in OPTIONAL, f"no default: {entry}"
