"""Runs that are killed, stopped or run out of disk are resumed, and end with the results of an uninterrupted run."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import sample_candor
import tiny_models
import torch
from accelerate import Accelerator
from conftest import ROOT, environment_of_its_own

from geli.nets.policy import load_policy
from geli.rl.prompts import Prompt
from geli.run.errors import UserError
from geli.run.gradients import NotFinite
from geli.run.lock import RunLock, lock_new_run, reward_run_to_resume
from models import PPO, PPOConfig

# Each stage is killed so often, at random moments and at random points of writing files; .ci/run asks for 20 kills.
KILLS = int(os.environ.get("GELI_KILLS", "4"))
STAGES = {
    1: ("train_reward_LI_only.py", "--val --small_model_shrink --epochs 3 --batch_size 8 --learning_rate 1e-3"),
    2: ("train_reward_GELI.py", "--train --val --small_model_shrink --epochs 12 --affect_path li --learning_rate 1e-2"),
    3: ("train_rl_GELI.py", "--train --val --rf_model GELI --steps 12 --batch_size 4 --val_prompts 4"),
}


class Server:
    """`fault_server.py`, with mounts of its own where the system allows that."""

    def __init__(self):
        own = ["unshare", "--user", "--map-root-user", "--mount"]
        try:
            self.mounts = subprocess.run([*own, "true"], capture_output=True).returncode == 0
        except FileNotFoundError:
            self.mounts = False
        environment = environment_of_its_own(OMP_NUM_THREADS="1", WANDB_MODE="disabled")
        command = [*(own if self.mounts else []), sys.executable, str(ROOT / "tests" / "support" / "fault_server.py")]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def __call__(self, **request) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server():
    found = Server()
    yield found
    found.process.stdin.close()
    found.process.wait(timeout=60)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of 12 conversations, with small models."""
    folder = tmp_path_factory.mktemp("faults")
    sample_candor.write_corpus(folder / "candor", conversations=12, n_turns=8, seed=0)
    tiny_models.build(folder / "candor", folder / "models", ("bart", "llama"), seed=0, steps=4)
    return folder


def options_of(stage: int, corpus, out) -> list[str]:
    _, words = STAGES[stage]
    data = ["--data_dir", corpus / "candor", "--output_dir", out, "--context_turns", 2, "--no_cache", "--save_steps", 2]
    model = {
        1: ["--lang_model_path", corpus / "models" / "bart", "--run_name", "li"],
        2: ["--run_name", "geli"],
        3: ["--model_name", corpus / "models" / "llama"],
    }[stage]
    return [*words.split(), *map(str, [*data, *model])]


def results(stage: int, out) -> dict[str, bytes | str]:
    """Name -> content of what a stage has made; seconds are left out."""
    folder = next(out.glob({1: "SINGLE_*", 2: "visual_*", 3: "rlmf_weights"}[stage]))
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json" and path.parent == folder:
            found[name] = json.dumps(json.loads(path.read_text())["metrics"])
        elif path.suffix == ".csv":
            table = pd.read_csv(path)
            found[name] = table[[c for c in table if not c.startswith("seconds_")]].to_csv()
        elif path.is_file() and path.suffix != ".png" and path.name not in ("README.md", "adapter_config.json"):
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def uninterrupted(server, corpus):
    """The output folder of the three stages, and of each its seconds and the number of its writing steps."""
    out, about = corpus / "out", {}
    for stage, (script, _) in STAGES.items():
        ran = server(script=script, arguments=options_of(stage, corpus, out), log=str(corpus / "log"))
        assert ran["code"] == 0, ran["output"]
        about[stage] = ran["seconds"], int(re.search(r"EVENTS (\d+)", ran["output"])[1])
    return out, about


def begin(stage: int, out, uninterrupted):
    """A new output folder with what the stages before `stage` have made."""
    out.mkdir()
    for folder in earlier(stage, uninterrupted):
        shutil.copytree(folder, out / folder.name)
    return out


def earlier(stage: int, out) -> list:
    return [next(out.glob(pattern)) for pattern in ("SINGLE_*", "visual_*")[: stage - 1]]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(stage, server, corpus, uninterrupted, tmp_path):
    whole, about = uninterrupted
    seconds, events = about[stage]
    rng, expected = random.Random(stage), results(stage, whole)
    kills, runs, going_on = 0, 0, 0
    out = begin(stage, tmp_path / "0", whole)
    while True:
        how = {}
        if kills < KILLS:
            how = {"seconds": rng.uniform(0.2, seconds)} if kills % 2 else {"event": rng.randint(1, events // 3)}
        arguments = [*options_of(stage, corpus, out), "--resume"]
        ran = server(script=STAGES[stage][0], arguments=arguments, log=str(tmp_path / "log"), **how)
        going_on += "Resuming after step" in ran["output"]
        if ran["code"] == -signal.SIGKILL:
            kills += 1
            continue
        assert ran["code"] == 0, ran["output"]
        assert results(stage, out) == expected
        assert not [path for path in out.rglob(".*") if path.is_file()]  # nothing temporary stays
        if kills == KILLS:
            break
        runs += 1
        out = begin(stage, tmp_path / str(runs), whole)
    assert going_on >= KILLS // 3


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_named_and_what_was_kept_goes_on(stage, server, corpus, uninterrupted, tmp_path):
    if not server.mounts:
        pytest.skip("this system lets nobody but root mount a file system")
    whole, _ = uninterrupted
    run = {"script": STAGES[stage][0], "log": str(tmp_path / "log")}
    probe, disk = begin(stage, tmp_path / "probe", whole), tmp_path / "disk"
    server(**run, arguments=options_of(stage, corpus, probe), event=uninterrupted[1][stage][1] // 2)
    state = max(path.stat().st_size for path in probe.rglob("step_*.pt"))
    there = sum(path.stat().st_size for folder in earlier(stage, whole) for path in folder.rglob("*"))
    room = there + 100_000 + int(2.5 * state)  # two states fit, and not the third before the first is removed
    disk.mkdir()
    mounted = server(shell=f"mount -t tmpfs -o size={room} none {disk}")
    assert mounted["code"] == 0, mounted["output"]
    for folder in earlier(stage, whole):
        assert server(shell=f"cp -r {folder} {disk}/")["code"] == 0
    arguments = options_of(stage, corpus, disk)
    ran = server(**run, arguments=arguments)
    assert ran["code"] == 2, ran["output"]
    error = next(line for line in ran["output"].splitlines() if ": error: " in line)
    assert str(disk) in error and "No space left on device" in error
    assert re.search(r"the checkpoint after step \d+ of \d+ is kept in .*/state_.*--resume", error)
    assert server(shell=f"mount -o remount,size=1g {disk}")["code"] == 0
    ran = server(**run, arguments=[*arguments, "--resume"])
    assert ran["code"] == 0 and "Resuming after step" in ran["output"], ran["output"]
    copy = tmp_path / "copy"
    assert server(shell=f"cp -r {disk} {copy} && umount {disk}")["code"] == 0
    assert results(stage, copy) == results(stage, whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_ends_the_step_and_says_how_to_go_on(stage, number, code, server, corpus, uninterrupted, tmp_path):
    whole, about = uninterrupted
    out, run = begin(stage, tmp_path / "out", whole), {"script": STAGES[stage][0], "log": str(tmp_path / "log")}
    arguments = options_of(stage, corpus, out)
    more = {1: ["--epochs", "500"], 2: ["--epochs", "500"], 3: ["--steps", "500"]}[stage]
    ran = server(**run, arguments=[*arguments, *more], signal=[number, about[stage][0]])
    assert ran["code"] == code, ran["output"]
    last = ran["output"].splitlines()[-2]  # before the harness' own line
    expected = rf"stopped by {number.name} after step (\d+) of .*the checkpoint after step \1 of .*--resume"
    assert re.search(expected, last)
    assert len(list(out.rglob("step_*.pt"))) == 2  # the newest two are kept


def test_a_damaged_state_is_left_out_for_the_one_before(server, corpus, uninterrupted, tmp_path):
    whole, about = uninterrupted
    out, run = begin(2, tmp_path / "out", whole), {"script": STAGES[2][0], "log": str(tmp_path / "log")}
    arguments = options_of(2, corpus, out)
    server(**run, arguments=arguments, event=about[2][1] // 2)
    kept = sorted(out.rglob("step_*.pt"))
    content = bytearray(kept[-1].read_bytes())
    content[len(content) // 2] ^= 1
    kept[-1].write_bytes(content)
    ran = server(**run, arguments=[*arguments, "--resume"])
    assert ran["code"] == 0, ran["output"]
    assert f"Checkpoint {kept[-1]} is skipped" in ran["output"]
    assert f": {kept[-2]}" in ran["output"]
    assert results(2, out) == results(2, whole)


def test_a_run_goes_on_with_its_own_options_and_data_only(server, corpus, uninterrupted, tmp_path):
    whole, about = uninterrupted
    out, run = begin(2, tmp_path / "out", whole), {"script": STAGES[2][0], "log": str(tmp_path / "log")}
    arguments = [*options_of(2, corpus, out), "--resume"]
    server(**run, arguments=arguments, event=about[2][1] // 2)
    ran = server(**run, arguments=[*arguments, "--seed", "1"])
    assert ran["code"] == 2 and "state_geli was started with --seed 0, not 1" in ran["output"]
    other = tmp_path / "candor"
    shutil.copytree(corpus / "candor", other)
    transcript = next(other.rglob("transcript_cliffhanger.csv"))
    transcript.write_text(transcript.read_text().replace("I", "We", 1))
    ran = server(**run, arguments=[*arguments, "--data_dir", str(other)])
    assert ran["code"] == 2 and "not the same data" in ran["output"], ran["output"]
    ran = server(**run, arguments=arguments[:-1])
    assert ran["code"] == 2 and "has a run of that name already" in ran["output"] and "--resume" in ran["output"]
    ran = server(**run, arguments=[word for word in arguments if word not in ("--run_name", "geli")])  # the newest
    assert ran["code"] == 0 and "Resuming after step" in ran["output"]
    ran = server(**run, arguments=arguments)
    assert ran["code"] == 0 and "the run geli is complete already" in ran["output"]


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (1, "--contrastive --curriculum_exposure"),
        (2, "--unfreeze --contrastive --curriculum_exposure --epochs 4"),
        (2, "--redist_type RUDDER --batch_size 2"),
        (3, "--reward random"),
        (3, "--sft_steps 2"),
    ],
)
def test_other_options_go_on_as_well(stage, words, server, corpus, uninterrupted, tmp_path):
    whole, _ = uninterrupted
    found, events = [], 0
    for name in ("whole", "killed"):
        out, run = begin(stage, tmp_path / name, whole), {"script": STAGES[stage][0], "log": str(tmp_path / "log")}
        arguments = [word for word in options_of(stage, corpus, out) if stage != 1 or word != "--val"]
        arguments += words.split()
        if name == "killed":
            ran = server(**run, arguments=arguments, event=events * 2 // 3)
            assert ran["code"] == -signal.SIGKILL, ran["output"]
            arguments += ["--resume"]
        ran = server(**run, arguments=arguments)
        assert ran["code"] == 0, ran["output"]
        events = int(re.search(r"EVENTS (\d+)", ran["output"])[1])
        found.append(results(stage, out))
    assert "Resuming after step" in ran["output"]
    assert found[0] == found[1]


def test_a_run_that_died_before_it_had_a_state_does_not_hold_its_name(server, corpus, uninterrupted, tmp_path):
    whole, _ = uninterrupted
    out, run = begin(2, tmp_path / "out", whole), {"script": STAGES[2][0], "log": str(tmp_path / "log")}
    wrong = [word for word in options_of(2, corpus, out) if word != "--small_model_shrink"]  # as stage 1's head is
    ran = server(**run, arguments=wrong)
    assert ran["code"] == 2 and "the options ask for default" in ran["output"]
    assert list(out.glob("visual_*/state_geli"))
    ran = server(**run, arguments=options_of(2, corpus, out))
    assert ran["code"] == 0, ran["output"]


def test_resume_without_a_name_leaves_other_runs_alone(server, corpus, uninterrupted, tmp_path):
    whole, about = uninterrupted
    out, run = begin(2, tmp_path / "out", whole), {"script": STAGES[2][0], "log": str(tmp_path / "log")}
    arguments = [word for word in options_of(2, corpus, out) if word not in ("--run_name", "geli")]
    server(**run, arguments=[*arguments, "--seed", "1"], event=about[2][1] // 2)
    ran = server(**run, arguments=[*arguments, "--resume"])
    assert ran["code"] == 0, ran["output"]
    assert "was started with --seed 1, not 0" in ran["output"] and "starting from the beginning" in ran["output"]
    assert len(list(out.glob("visual_*/state_*"))) == 1  # the other one's


def test_what_is_left_of_a_finished_runs_states_does_not_begin_it_again(tmp_path):
    arguments = {"resume": True, "run_name": "mine", "seed": 0}
    (tmp_path / "state_mine").mkdir()
    (tmp_path / "reward1_mine.json").write_text(json.dumps({"arguments": arguments}))
    with pytest.raises(SystemExit) as complete:
        reward_run_to_resume(arguments, tmp_path)
    assert complete.value.code == 0


@pytest.mark.parametrize(
    "content",
    [
        {"arguments": {}, "wandb": {"id": "abc", "name": "../../../evil"}},
        {"arguments": {}, "wandb": "x"},
        {"arguments": [], "wandb": {"id": "abc", "name": "x"}},
        {"arguments": {}, "wandb": {"id": "../x", "name": "x"}},
        [1],
    ],
)
def test_a_hostile_description_of_a_run_is_none(content, tmp_path):
    (tmp_path / "state_x").mkdir()
    (tmp_path / "state_x" / "run.json").write_text(json.dumps(content))
    (tmp_path / "state_x" / "step_00000001.pt").touch()
    assert reward_run_to_resume({"resume": True, "run_name": None, "seed": 0}, tmp_path) is None
    assert RunLock(tmp_path, "x", re.compile(""), resume=True).description == {}


def test_what_is_not_finite_ends_the_run_and_names_the_batch(server, corpus, uninterrupted, tmp_path):
    whole, _ = uninterrupted
    for stage, more in {1: [], 2: ["--lambda", "1"], 3: []}.items():
        words = ["--learning_rate", "1e30", *more]
        out, run = begin(stage, tmp_path / str(stage), whole), {"log": str(tmp_path / "log")}
        ran = server(script=STAGES[stage][0], arguments=[*options_of(stage, corpus, out), *words], **run)
        assert ran["code"] == 2, ran["output"]
        found = re.search(r"not finite at step (\d+) \(batch: .*checkpoint after step (\d+) of", ran["output"])
        assert int(found[1]) == int(found[2]) + 1
        batch = json.loads(next(out.rglob("not_finite.json")).read_text())["batch"]
        assert batch and all(name.split("/")[0] in {p.name for p in (corpus / "candor").iterdir()} for name in batch)


def test_a_reward_that_is_not_finite_leaves_the_policy_alone(tiny):
    policy = load_policy(str(tiny / "llama"), 4, 8, torch.float32)
    scores = iter([torch.ones(4), torch.ones(4), torch.tensor([1.0, float("nan"), 1.0, 1.0]), torch.ones(4)])
    ppo = PPO(policy, lambda *_: next(scores), PPOConfig(batch_size=4, max_new_tokens=33), Accelerator(cpu=True), 0)
    prompts = [Prompt(" User: hi AI:", "", "hello")] * 4
    ppo.step(prompts)
    before = [p.detach().clone() for p in policy.trainable()]
    with pytest.raises(NotFinite, match="score"):
        ppo.step(prompts)
    assert all(torch.equal(a, b) for a, b in zip(policy.trainable(), before, strict=True))
    assert np.isfinite(ppo.moments.mean)


def test_a_name_belongs_to_one_living_run(tmp_path):
    first = lock_new_run(tmp_path, "mine")
    with pytest.raises(UserError, match="is being trained by another process"):
        lock_new_run(tmp_path, "mine")
    with pytest.raises(UserError, match="is being trained by another process"):
        RunLock(tmp_path, "mine", re.compile(""), resume=True)
    names = {lock_new_run(tmp_path).name for _ in range(30)}
    assert len(names) == 30 and "mine" not in names
    runs_record = tmp_path / "reward1_mine.json"
    runs_record.write_text("{}")
    first.remove()  # finished
    (tmp_path / "state_mine").mkdir()  # or killed while it was removing this
    with pytest.raises(UserError, match="has a run of that name already"):
        lock_new_run(tmp_path, "mine")


def test_two_runs_in_one_folder_at_once_do_not_disturb_each_other(corpus, uninterrupted, tmp_path):
    whole, _ = uninterrupted
    out = begin(2, tmp_path / "out", whole)
    words = [word for word in options_of(2, corpus, out) if word not in ("--run_name", "geli")]
    command = [sys.executable, str(ROOT / STAGES[2][0]), *words]
    environment = environment_of_its_own(OMP_NUM_THREADS="1", WANDB_MODE="offline")
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    heads = [path for path in out.glob("visual_*/reward1_*") if path.suffix != ".json"]
    expected = results(2, whole)
    assert len(heads) == 2 and all(head.read_bytes() == expected["reward1_geli"] for head in heads)
    tables = [pd.read_csv(path) for path in out.glob("visual_*/val_turn_rewards_*.csv")]
    assert len(tables) == 2 and all(table.to_csv() == expected["val_turn_rewards_geli.csv"] for table in tables)


def test_stage_3_leaves_a_living_runs_files_alone_and_moves_a_dead_ones_aside(server, corpus, uninterrupted, tmp_path):
    whole, about = uninterrupted
    out, run = begin(3, tmp_path / "out", whole), {"script": STAGES[3][0], "log": str(tmp_path / "log")}
    arguments = options_of(3, corpus, out)
    server(**run, arguments=arguments, event=about[3][1] // 2)
    folder = out / "rlmf_weights"
    living = RunLock(folder, "GELI_llama", re.compile(""), resume=True)
    ran = server(**run, arguments=arguments)
    assert ran["code"] == 2 and "is being trained by another process" in ran["output"], ran["output"]
    left = sorted(path.name for path in living.unfinished())
    assert left[0] == "run.json" and left[-1].startswith("step_")
    living.release()  # it dies
    ran = server(**run, arguments=arguments)
    assert ran["code"] == 0 and "its checkpoints (it is unfinished) are now in" in ran["output"], ran["output"]
    aside = folder / "GELI_llama.earlier-1" / "state_GELI_llama"
    assert sorted(path.name for path in aside.iterdir()) == left
    found = results(3, out)
    assert {name: found[name] for name in results(3, whole)} == results(3, whole)
