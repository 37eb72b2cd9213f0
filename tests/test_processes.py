"""All three stages in two processes: the same results as in one, one writer, and no hang when one dies."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
from conftest import ROOT

OPTIONS = {  # heads without dropout: its random numbers are each process' own
    "train_reward_LI_only.py": "--val --epochs 1 --batch_size 31 --learning_rate 1e-3 --run_name li",
    "train_reward_GELI.py": "--train --val --affect_path li --epochs 2 --batch_size 1 --K 3 --run_name geli",
    "train_rl_GELI.py": "--train --val --steps 2 --batch_size 7 --val_prompts 5 --rf_model GELI",
}


def launch(processes: int, script: str, *options, wait=True):
    """Runs a script in one process, or in several that talk over gloo."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(ROOT / script), *map(str, options)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    if not wait:
        return process
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, out + error
    return out


@pytest.fixture(scope="module")
def runs(sample, tiny, tmp_path_factory):
    """{processes: (output folder, {script: what it printed})}"""
    found = {}
    for processes in (1, 2):
        out = tmp_path_factory.mktemp(f"processes{processes}")
        printed = {}
        for script, options in OPTIONS.items():
            data = ["--data_dir", sample, "--output_dir", out, "--context_turns", 2, "--dtype", "float32"]
            if script == "train_reward_LI_only.py":
                data += ["--lang_model_path", tiny / "bart"]
            elif script == "train_rl_GELI.py":
                data += ["--model_name", tiny / "llama"]
            printed[script] = launch(processes, script, *options.split(), *data)
        found[processes] = (out, printed)
    return found


@pytest.mark.parametrize("run", ["li", "geli"])
def test_reward_stages_give_what_one_process_gives(runs, run):
    metrics = {}
    for processes, (out, _) in runs.items():
        record = json.loads(next(out.glob(f"*/reward1_{run}.json")).read_text())
        metrics[processes] = record["metrics"]["validation"]
    assert metrics[1].keys() == metrics[2].keys()
    for name, value in metrics[1].items():
        assert metrics[2][name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_stage_3_gives_what_one_process_gives(runs):
    first, second = (pd.read_csv(out / "rlmf_weights" / "GELI_llama_steps.csv") for out, _ in runs.values())
    columns = ("score_mean", "human_score_mean", "kl", "policy_loss", "value_loss", "entropy", "response_length_mean")
    for column in columns:
        assert second[column][0] == pytest.approx(first[column][0], abs=1e-3), column
    before = [json.loads((out / "rlmf_weights" / "GELI_llama.json").read_text())["metrics"] for out, _ in runs.values()]
    assert before[1]["before"] == pytest.approx(before[0]["before"], abs=1e-3)


def test_one_process_writes_and_speaks(runs):
    names = [
        {path.relative_to(out).as_posix() for path in out.rglob("*") if "wandb" not in path.parts and path.is_file()}
        for out, _ in runs.values()
    ]
    kept = [{name for name in found if not name.startswith("cache/features")} for found in names]
    assert kept[0] == kept[1]
    assert not [name for name in names[1] if ".tmp" in name]
    for _, printed in runs.values():
        for text in printed.values():
            assert text.count("Written:") == 1 and text.count("conversations, ") >= 1
    assert len(list((runs[2][0] / "wandb").glob("offline-run-*"))) == 3  # one a stage


def test_when_one_process_is_killed_the_others_end_with_an_error(sample, tiny, tmp_path):
    options = ["--data_dir", sample, "--output_dir", tmp_path, "--lang_model_path", tiny / "bart", "--epochs", 500]
    launcher = launch(2, "train_reward_LI_only.py", *options, "--run_name", "killed", wait=False)
    wandb = tmp_path / "wandb"
    deadline = time.time() + 120
    while not list(wandb.glob("offline-run-*")):  # training is about to begin
        assert launcher.poll() is None and time.time() < deadline
        time.sleep(0.2)
    time.sleep(3)
    workers = [p for p in psutil.Process(launcher.pid).children() if "train_reward_LI_only.py" in " ".join(p.cmdline())]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
