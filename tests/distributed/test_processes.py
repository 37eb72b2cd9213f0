"""All three stages in two processes, with whole copies of the models and with sharded layers: the results are those of
one process, one process writes, and none hangs when another dies."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import ROOT, call_script, environment_of_its_own, small_model
from safetensors.torch import load_file
from sharded_kinds import ENCODERS, POLICIES
from transformers import AutoModelForCausalLM, BartModel
from worker import run_job

from geli.run.sharding import check_sharding
from tools import sample_candor

pytestmark = pytest.mark.slow
CONFIGS = ROOT / "accelerate_configs"
LI, GELI, RL = "train_reward_LI_only.py", "train_reward_GELI.py", "train_rl_GELI.py"
OPTIONS = {  # heads without dropout, whose random numbers are each process' own; rates that move what is trained
    "li": (LI, "--val --epochs 2 --batch_size 15 --learning_rate 1e-3 --save_steps 3"),
    "geli": (GELI, "--train --val --epochs 1 --batch_size 1 --K 3 --learning_rate 1e-2"),
    # as many tokens at once as make the processes' numbers of passes differ
    "unfrozen": (
        GELI,
        "--train --val --epochs 1 --batch_size 1 --K 3 --unfreeze --encoder_learning_rate 1e-3 --tokens_per_batch 120",
    ),
    # of the minibatches and of the held-out prompts one process has fewer, and of the last ones none
    "ppo": (RL, "--train --val --steps 2 --batch_size 9 --val_prompts 5 --save_steps 1 --learning_rate 1e-2"),
    # groups of responses, the exact KL, and the ridge critic, which gives values from the second step on
    "small": (RL, "--train --val --preset small --steps 3 --batch_size 12 --mini_batch_size 4 --save_steps 3"),
    "distill": (RL, "--train --val --preset small --algo distill --steps 2 --batch_size 12 --save_steps 2"),
}
POLICY_RUNS = ("ppo", "small", "distill")
# what `accelerate launch` sets for a DeepSpeed file, where DeepSpeed is installed; None removes what it sets for FSDP
ZERO_2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_USE_FSDP": None}
WHOLE = {"ACCELERATE_USE_FSDP": None}


def environment_of(path: Path) -> dict[str, str]:
    """The environment that `accelerate launch --config_file PATH` starts a script in."""
    args = accelerate_launch.launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    args, *_ = accelerate_launch._validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ""
    return prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A corpus of 12 conversations, and small models."""
    folder = tmp_path_factory.mktemp("inputs")
    sample_candor.write_corpus(folder / "candor", conversations=12, n_turns=8, seed=0)
    for kind in ("bart", "llama", *ENCODERS, *POLICIES):
        small_model(kind, folder / kind, folder / "candor")
    config = folder / "bart" / "config.json"  # without dropout, as the heads
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dropout": 0.0}))
    return folder


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """What the stages left and showed in one process and in two. Stages 2 and 3 start everywhere from what one process
    trained in the stages before.

    Attributes:
        one, two, sharded: output folders of one process, of two with whole copies and of two with sharded models.
        resumed: that of a sharded run that was resumed. killed: exit codes of its processes, of which one was killed.
        shown: name of a job -> what each process saw of it.
    """
    folder = tmp_path_factory.mktemp("processes")
    found = SimpleNamespace(shown={})
    found.one, found.two, found.sharded, found.resumed = (folder / n for n in ("one", "two", "sharded", "resumed"))
    starts = {"li": ["--lang_model_path", inputs / "bart"]}
    starts |= {run: ["--model_name", inputs / "llama", "--exp_name", run] for run in POLICY_RUNS}

    def job(name: str, run: str, out: Path, environment: dict | None = None, *more: str, **rest) -> dict:
        script, words = OPTIONS[run]
        arguments = [*words.split(), "--data_dir", inputs / "candor", "--output_dir", out, "--context_turns", 2]
        arguments += ["--no_cache", *starts[run], *([] if run in POLICY_RUNS else ["--run_name", run]), *more]
        return {"name": name, "script": script, "arguments": arguments, "environment": environment, **rest}

    for run in OPTIONS:
        alone = job(run, run, found.one)
        del alone["name"]
        found.shown[run] = [run_job(**alone)]
        if run == "li":
            head = next(found.one.glob("*/reward1_li"))
            starts |= {"geli": ["--affect_path", head], "unfrozen": ["--affect_path", head]}
        elif run == "geli":
            for policy_run in POLICY_RUNS:
                starts[policy_run] += ["--reward_path", next(found.one.glob("*/reward1_geli"))]
    sharding = {n: value for n, value in environment_of(CONFIGS / "fsdp.yaml").items() if os.environ.get(n) != value}
    dying = job("killed", "li", found.resumed, ZERO_2, dies_after=4)  # between two checkpoints
    jobs = [job(f"two {run}", run, found.two, WHOLE) for run in ("li", "geli", *POLICY_RUNS)]
    jobs += [job("sharded li", "li", found.sharded, ZERO_2), job("resumed", "li", found.resumed, ZERO_2, "--resume")]
    jobs += [job(f"sharded {run}", run, found.sharded) for run in ("unfrozen", "ppo")]
    jobs += [{"name": "kinds", "script": "sharded_kinds", "arguments": [inputs]}]
    launches = [{"jobs": [dying], "environment": sharding}, {"jobs": jobs, "environment": sharding}]
    (folder / "launches.json").write_text(json.dumps(launches, default=str))
    command = [sys.executable, ROOT / "tests" / "support" / "worker.py", folder / "launches.json", folder]
    environment = environment_of_its_own(OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    found.killed, codes = json.loads((folder / "codes.json").read_text())
    assert codes == [0, 0], done.stdout + done.stderr
    for name in (job["name"] for job in jobs):
        found.shown[name] = [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The same results


def assert_same_log(first: list[dict], second: list[dict]) -> None:
    """What was logged at every step, such as losses and gradient norms, is the same."""
    assert [row.keys() for row in first] == [row.keys() for row in second] and len(first) > 1
    for a, b in zip(first, second, strict=True):
        for name in (name for name in a if "seconds" not in name):
            tolerance = 0.05 if name.endswith("clip_fraction") else 1e-5  # a fraction counts rounding too
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=tolerance), f"{name} at step {a['step']}"


def assert_same_weights(first: Path, second: Path, start: dict, atol: float, least: float) -> None:
    """The weights in two files are the same to `atol`, and training moved many of them by more than `least`."""
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    names = [name for name in first if not name.endswith("k_proj.bias")]  # gradient 0 but for rounding, scaled by Adam
    for name in names:
        difference = (second[name] - first[name]).abs().max()
        assert difference < atol, f"{name} differs by {difference:.2g}"
    moved = [name for name in names if (first[name] - start.get(name, 0)).abs().max() > least]
    assert len(moved) > len(names) / 4, moved


def metrics_of(folder: Path, pattern: str) -> dict:
    return json.loads(next(folder.glob(pattern)).read_text())["metrics"]


@pytest.mark.parametrize(("name", "run"), [("two", "li"), ("two", "geli"), ("sharded", "li"), ("sharded", "unfrozen")])
def test_a_reward_run_gives_what_one_process_gives(runs, name, run):
    out = getattr(runs, name)
    assert_same_log(runs.shown[run][0]["logged"], runs.shown[f"{name} {run}"][0]["logged"])
    first, second = (metrics_of(folder, f"*/reward1_{run}.json")["validation"] for folder in (runs.one, out))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert second[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key
    heads = [next(folder.glob(f"*/reward1_{run}")) for folder in (runs.one, out)]
    start = {} if run == "li" else load_file(next(runs.one.glob("*/reward1_li")))
    assert_same_weights(*heads, start, atol=1e-4, least=1e-3)


@pytest.mark.parametrize(("name", "run"), [("two", "li"), ("sharded", "li"), ("sharded", "unfrozen")])
def test_an_encoder_that_trains_becomes_what_one_process_makes_of_it(runs, inputs, name, run):
    encoders = [next(f.glob(f"*/lang_model_{run}")) / "model.safetensors" for f in (runs.one, getattr(runs, name))]
    start = {"li": inputs / "bart", "unfrozen": next(runs.one.glob("*/lang_model_li"))}[run]
    assert_same_weights(*encoders, load_file(start / "model.safetensors"), atol=1e-3, least=3e-3)


@pytest.mark.parametrize(("name", "run"), [("two", "ppo"), ("sharded", "ppo"), ("two", "small"), ("two", "distill")])
def test_a_policy_run_gives_what_one_process_gives(runs, name, run):
    assert_same_log(runs.shown[run][0]["logged"], runs.shown[f"{name} {run}"][0]["logged"])
    folders = [out / "rlmf_weights" for out in (runs.one, getattr(runs, name))]
    first, second = (metrics_of(folder, f"{run}_llama.json") for folder in folders)
    for when in ("before", "after"):
        numbers, others = ({k: v for k, v in found[when].items() if v is not None} for found in (first, second))
        assert others == pytest.approx(numbers, rel=1e-3, abs=1e-3)  # the prompts' one conversation has no interval
    for step in {"ppo": (1, 2), "small": (3,), "distill": (2,)}[run]:
        for file in ("adapter_model.safetensors", *(["value_head.safetensors"] if run == "ppo" else [])):
            weights = (f / f"{run}_llama_{step}" / file for f in folders)
            assert_same_weights(*weights, {}, atol=1e-4 if run == "ppo" else 1e-3, least=1e-3)


def test_sharded_models_of_several_architectures_compute_what_whole_copies_do(runs):
    assert "compared: " + " ".join((*ENCODERS, *POLICIES)) in runs.shown["kinds"][0]["printed"]


def test_a_process_holds_half_of_the_layers_weights(runs, inputs):
    bart, llama = BartModel.from_pretrained(inputs / "bart"), AutoModelForCausalLM.from_pretrained(inputs / "llama")
    bart_layers = [*bart.encoder.layers, *bart.decoder.layers]
    for run, parts in {"li": bart_layers, "unfrozen": bart_layers, "ppo": llama.model.layers}.items():
        text = runs.shown[f"sharded {run}"][0]["printed"]
        numbers = re.search(r"of ([\d,]+) weights .* holds ([\d,]+) ", text).groups()
        total, mine = (int(number.replace(",", "")) for number in numbers)
        assert total - mine == sum(p.numel() for part in parts for p in part.parameters()) / 2
    assert "weights each of" not in runs.shown["two li"][0]["printed"]


# ---------------------------------------------------------------------------------------------------------------------
# One process writes


def test_one_process_writes_and_speaks(runs):
    one, two = ({path.relative_to(out).as_posix() for path in out.rglob("*")} for out in (runs.one, runs.two))
    assert {name for name in one if "unfrozen" not in name} == two  # whole copies did not run that
    for run in ("li", "geli", "ppo"):
        shown = runs.shown[f"two {run}"]
        assert [found["printed"].count("Written:") for found in shown] == [1, 0]
        assert [found["wandb_runs"] for found in shown] == [1, 0]
        assert shown[1]["printed"] == ""


def test_what_sharded_runs_leave_has_the_same_names_and_loads_in_one_process(runs, inputs):
    for pattern in ("*/lang_model_li/*", "*/lang_model_unfrozen/*", "rlmf_weights/ppo_*", "rlmf_weights/ppo_llama_2/*"):
        names = [{path.name for path in folder.glob(pattern)} for folder in (runs.one, runs.sharded)]
        assert names[0] == names[1] and names[0], pattern
    assert not list(runs.sharded.rglob("*.tmp*"))
    data = ["--data_dir", inputs / "candor", "--output_dir", runs.sharded, "--model_name", inputs / "llama"]
    head = next(runs.sharded.glob("*/reward1_unfrozen"))
    run_job(RL, ["--val", "--val_prompts", 3, "--exp_name", "ppo", "--reward_path", head, "--no_cache", *data])


# ---------------------------------------------------------------------------------------------------------------------
# When one dies


def test_when_one_process_is_killed_the_others_end_with_an_error(runs):
    assert runs.killed == [1, -signal.SIGKILL]


def test_a_sharded_run_is_resumed_after_a_kill(runs):
    resumed, whole = (runs.shown[name][0] for name in ("resumed", "sharded li"))
    assert "Resuming after step 3 of " in resumed["printed"]
    assert resumed["logged"] == whole["logged"][3:] and resumed["logged"]
    for name in ("reward1_li", "lang_model_li/model.safetensors"):
        first, second = (load_file(next(out.glob(f"*/{name}"))) for out in (runs.sharded, runs.resumed))
        assert all(torch.equal(first[key], second[key]) for key in first), name


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations(path, monkeypatch):
    found = environment_of(path)
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
def test_a_configuration_that_is_not_supported_is_refused(variable, value, says, monkeypatch):
    monkeypatch.setenv(variable, value)
    refused = call_script(RL, "--val", "--device", "cpu", check=2)
    assert says in refused.stderr and len(refused.stderr.splitlines()) == 1
