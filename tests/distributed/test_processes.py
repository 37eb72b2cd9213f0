"""All three stages in two processes, with whole copies of the models and with sharded layers: the results are those of
one process, one process writes, and none hangs when another dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import torch
from conftest import ROOT, environment_of_its_own, run_script, small_model
from safetensors.torch import load_file

from geli.run.sharding import check_sharding

CONFIGS = ROOT / "accelerate_configs"
OPTIONS = {  # heads without dropout: its random numbers are each process' own
    "train_reward_LI_only.py": "--val --epochs 1 --batch_size 31 --learning_rate 1e-3 --run_name li",
    "train_reward_GELI.py": "--train --val --affect_path li --epochs 2 --batch_size 1 --K 3 --run_name geli",
    # of the minibatches and of the held-out prompts one process has fewer, and of the last ones none; the learning rate
    # is so high that an update moves the adapter
    "train_rl_GELI.py": "--train --val --steps 2 --batch_size 9 --val_prompts 10 --rf_model GELI --learning_rate 1e-2",
}
UNFROZEN = "--train --val --epochs 1 --batch_size 1 --K 3 --unfreeze --encoder_learning_rate 1e-3 --run_name unfrozen"


def launch(processes: int, script: str, *options, config: str | None = None, wait=True, **environment):
    """Runs a script in one process, or in several that talk over gloo; with `config` as `accelerate launch` does with
    that file of accelerate_configs/."""
    command = [sys.executable]
    if config:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        command += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
        command += ["--num_processes", str(processes), "--main_process_port", str(port)]
    elif processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(ROOT / script), *map(str, options)]
    if script.startswith("train"):
        command += ["--device", "cpu"]
    environment = environment_of_its_own(**{"OMP_NUM_THREADS": "1", **environment})
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    if not wait:
        return process
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, out + error
    return out


def common(sample, out) -> list:
    return ["--data_dir", sample, "--output_dir", out, "--context_turns", 2, "--dtype", "float32"]


@pytest.fixture(scope="module")
def runs(sample, tiny, tmp_path_factory):
    """{processes: (output folder, {script: what it printed})}"""
    found = {}
    for processes in (1, 2):
        out = tmp_path_factory.mktemp(f"processes{processes}")
        printed = {}
        for script, options in OPTIONS.items():
            data = common(sample, out)
            if script == "train_reward_LI_only.py":
                data += ["--lang_model_path", tiny / "bart"]
            elif script == "train_rl_GELI.py":
                data += ["--model_name", tiny / "llama"]
            printed[script] = launch(processes, script, *options.split(), *data)
        found[processes] = (out, printed)
    return found


@pytest.fixture(scope="module")
def sharded(sample, tiny, runs, tmp_path_factory):
    """(output folder of one process, of two with sharded models, {script: what those two printed})

    Stages 2 and 3 start in both from what one process trained in the stages before.
    """
    one, out = runs[1][0], tmp_path_factory.mktemp("sharded")
    li, geli = (next(one.glob(f"*/reward1_{run}")) for run in ("li", "geli"))
    scripts = list(OPTIONS)
    printed = {}
    # ZeRO 2, as `accelerate launch` passes it on: it needs DeepSpeed installed, which the scripts do not
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    options = [*OPTIONS[scripts[0]].split(), "--lang_model_path", tiny / "bart", *common(sample, out)]
    printed[scripts[0]] = launch(2, scripts[0], *options, **zero)
    # as many tokens at once as make the processes' numbers of passes differ
    options = [*UNFROZEN.split(), "--affect_path", li, "--tokens_per_batch", 120]
    launch(1, scripts[1], *options, *common(sample, one))
    printed[scripts[1]] = launch(2, scripts[1], *options, *common(sample, out), config="fsdp")
    options = [*OPTIONS[scripts[2]].split(), "--reward_path", geli, "--model_name", tiny / "llama"]
    printed[scripts[2]] = launch(2, scripts[2], *options, *common(sample, out), config="fsdp")
    return one, out, printed


def assert_same_validation(outs, run: str) -> None:
    """The validation metrics of a reward run are the same in both output folders."""
    first, second = (
        json.loads(next(out.glob(f"*/reward1_{run}.json")).read_text())["metrics"]["validation"] for out in outs
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert second[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def assert_same_ppo(outs) -> None:
    """Both steps, the weights after them, and what was measured before are the same in both output folders."""
    first, second = (pd.read_csv(out / "rlmf_weights" / "GELI_llama_steps.csv") for out in outs)
    columns = ("score_mean", "human_score_mean", "kl", "policy_loss", "value_loss", "entropy", "response_length_mean")
    for column in columns:
        assert second[column].tolist() == pytest.approx(first[column].tolist(), abs=2e-3), column
    assert second["gradient_norm"].tolist() == pytest.approx(first["gradient_norm"].tolist(), rel=1e-3)
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        one, two = (load_file(out / "rlmf_weights" / "GELI_llama_2" / name) for out in outs)
        moved = {key: value for key, value in one.items() if "lora_A" not in key}  # these start at 0
        assert all(value.abs().max() > 1e-3 for value in moved.values())
        difference = sum(((two[key] - value) ** 2).sum() for key, value in moved.items()) ** 0.5
        assert difference < 0.02 * sum((value**2).sum() for value in moved.values()) ** 0.5
    before = [json.loads((out / "rlmf_weights" / "GELI_llama.json").read_text())["metrics"] for out in outs]
    assert before[1]["before"] == pytest.approx(before[0]["before"], abs=1e-3)


@pytest.mark.parametrize("run", ["li", "geli"])
def test_reward_stages_give_what_one_process_gives(runs, run):
    outs = [out for out, _ in runs.values()]
    assert_same_validation(outs, run)
    one, two = (load_file(next(out.glob(f"*/reward1_{run}"))) for out in outs)
    for name, value in one.items():
        assert torch.allclose(two[name], value, atol=2e-3), name


def test_stage_3_gives_what_one_process_gives(runs):
    assert_same_ppo([out for out, _ in runs.values()])


@pytest.mark.parametrize("run", ["li", "unfrozen"])
def test_sharded_encoders_give_what_one_process_gives(sharded, tiny, run):
    assert_same_validation(sharded[:2], run)
    whole, gathered = (load_file(next(out.glob(f"*/lang_model_{run}")) / "model.safetensors") for out in sharded[:2])
    start = load_file(tiny / "bart" / "model.safetensors")
    assert whole.keys() == gathered.keys()
    moved = 0
    for name, weights in whole.items():
        if name.endswith("k_proj.bias"):
            continue  # its gradient is 0 but for rounding, which Adam makes steps of
        assert torch.allclose(gathered[name], weights, atol=1e-3), name
        moved += "encoder.layers" in name and not torch.allclose(weights, start[name], atol=3e-3)
    assert moved > 10  # else their equality would say little


def test_a_sharded_policy_gives_what_one_process_gives(sharded):
    assert_same_ppo(sharded[:2])


def test_sharded_models_write_the_same_files_which_load_in_one_process(sharded, sample, tiny):
    one, out, _ = sharded
    for pattern in ("*/lang_model_li/*", "*/lang_model_unfrozen/*", "rlmf_weights/*", "rlmf_weights/GELI_llama_2/*"):
        names = [{path.name for path in folder.glob(pattern)} for folder in (one, out)]
        assert names[0] == names[1] and names[0], pattern
    assert not list(out.rglob("*.tmp*"))
    options = ["--val", "--val_prompts", 3, "--reward_path", next(out.glob("*/reward1_unfrozen"))]
    launch(1, "train_rl_GELI.py", *options, "--model_name", tiny / "llama", *common(sample, out))


def test_a_process_holds_half_of_the_layers_weights(sharded, tiny):
    from transformers import AutoModelForCausalLM, BartModel

    bart, llama = BartModel.from_pretrained(tiny / "bart"), AutoModelForCausalLM.from_pretrained(tiny / "llama")
    layers = (
        [*bart.encoder.layers, *bart.decoder.layers],
        [*bart.encoder.layers, *bart.decoder.layers],
        llama.model.layers,
    )
    for text, parts in zip(sharded[2].values(), layers, strict=True):
        total, mine = (
            int(n.replace(",", "")) for n in re.search(r"of ([\d,]+) weights .* holds ([\d,]+) ", text).groups()
        )
        assert total - mine == sum(p.numel() for part in parts for p in part.parameters()) / 2


def test_a_sharded_run_resumes_after_a_kill(sharded, sample, tiny, tmp_path):
    script, zero = "train_reward_LI_only.py", {"ACCELERATE_USE_DEEPSPEED": "true"}
    zero["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = "2"
    options = [*OPTIONS[script].split(), "--lang_model_path", tiny / "bart", *common(sample, tmp_path)]
    options += ["--save_steps", 3, "--resume"]
    launcher = launch(2, script, *options, wait=False, **zero)
    while not list(tmp_path.glob("*/state_li/step_*")):
        assert launcher.poll() is None
        time.sleep(0.05)
    for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
        process.kill()
    launcher.communicate()
    assert "Resuming after step" in launch(2, script, *options, **zero)
    assert_same_validation([sharded[1], tmp_path], "li")


def test_several_architectures_can_be_sharded(sample, tmp_path):
    from sharded_kinds import ENCODERS, POLICIES

    for kind in (*ENCODERS, *POLICIES):
        small_model(kind, tmp_path / kind, sample)
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    assert "compared: " + " ".join((*ENCODERS, *POLICIES)) in launch(
        2, "tests/support/sharded_kinds.py", tmp_path, **fsdp
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations(path, monkeypatch):
    from accelerate.commands import launch as launcher
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    args = launcher.launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    args, *_ = launcher._validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ""
    found = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", found)
        check_sharding()  # refuses none of them
    sharded = path.stem.startswith(("fsdp", "deepspeed"))
    assert (found.get("ACCELERATE_USE_FSDP") == "true") == sharded
    if sharded:
        assert found["FSDP_RESHARD_AFTER_FORWARD"] == ("false" if path.stem.endswith("zero2") else "true")


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("ACCELERATE_USE_FSDP", "true", "fsdp_version 2"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "zero_stage from 0 to 3"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM"),
    ],
)
def test_what_is_not_done_is_refused(variable, value, says):
    result = run_script("train_rl_GELI.py", "--val", "--device", "cpu", check=2, **{variable: value})
    assert says in result.stderr and len(result.stderr.splitlines()) == 1


def test_one_process_writes_and_speaks(runs):
    names = [
        {path.relative_to(out).as_posix() for path in out.rglob("*") if "wandb" not in path.parts and path.is_file()}
        for out, _ in runs.values()
    ]
    # "unfrozen" is `sharded`'s, of one process alone
    kept = [{n for n in found if not n.startswith("cache/features") and "unfrozen" not in n} for found in names]
    assert kept[0] == kept[1]
    assert not [name for name in names[1] if ".tmp" in name]
    for _, printed in runs.values():
        for text in printed.values():
            assert text.count("Written:") == 1 and text.count("conversations, ") >= 1
    assert len(list((runs[2][0] / "wandb").glob("offline-run-*"))) == 3  # one a stage


def test_when_one_process_is_killed_the_others_end_with_an_error(sample, tiny, tmp_path):
    options = ["--data_dir", sample, "--output_dir", tmp_path, "--lang_model_path", tiny / "bart", "--epochs", 500]
    options += ["--run_name", "killed", "--save_steps", 2]
    launcher = launch(2, "train_reward_LI_only.py", *options, wait=False)
    while not list(tmp_path.glob("*/state_killed/step_*")):  # training has begun
        assert launcher.poll() is None
        time.sleep(0.1)
    workers = [p for p in psutil.Process(launcher.pid).children() if "train_reward_LI_only.py" in " ".join(p.cmdline())]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
