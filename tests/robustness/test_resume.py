"""Runs that are killed, stopped or run out of disk are resumed, and end with the results of an uninterrupted run."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, environment_of_its_own, small_model

from geli.nets.options import Adapter
from geli.nets.policy import load_policy
from geli.nets.prompts import Prompt
from geli.run.errors import UserError
from geli.run.gradients import NotFinite
from geli.run.lock import RunLock, lock_new_run, reward_run_to_resume
from models import PPO, PPOConfig
from tools import sample_candor

RANDOM_KILLS = int(os.environ.get("GELI_KILLS", "0"))  # of each stage, beside the chosen ones; `.ci/run` sets 20
STAGES = {
    1: ("train_reward_LI_only.py", "--val --small_model_shrink --epochs 3 --batch_size 16 --learning_rate 1e-3"),
    2: (
        "train_reward_GELI.py",
        "--train --val --small_model_shrink --epochs 3 --batch_size 2 --affect_path li --learning_rate 1e-2",
    ),
    3: ("train_rl_GELI.py", "--train --val --steps 7 --batch_size 4 --val_prompts 4"),
}
PATHS_INSIDE = ("README.md", "adapter_config.json")  # files of the adapter that name folders
FOLDERS = {1: "SINGLE_*", 2: "visual_*", 3: "rlmf_weights"}  # the folders that the stages write to


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
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
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
    """A corpus of 8 conversations, with small models."""
    folder = tmp_path_factory.mktemp("faults")
    sample_candor.write_corpus(folder / "candor", conversations=8, n_turns=6, seed=0)
    for kind in ("bart", "llama"):
        small_model(kind, folder / "models" / kind, folder / "candor")
    return folder


class Stage:
    """A stage in an output folder that has what the stages before it have made."""

    def __init__(self, server: Server, number: int, corpus: Path, out: Path, words: str = "", name: bool = True):
        self.server, self.number, self.out, self.log = server, number, out, out.with_name(f"{out.name}.log")
        self.script, own = STAGES[number]
        data = ["--data_dir", corpus / "candor", "--output_dir", out, "--context_turns", 2, "--no_cache"]
        model = {
            1: ["--lang_model_path", corpus / "models" / "bart", *(["--run_name", "li"] if name else [])],
            2: ["--run_name", "geli"] if name else [],
            3: ["--model_name", corpus / "models" / "llama"],
        }[number]
        self.arguments = [*own.split(), *map(str, [*data, "--save_steps", 2, *model]), *words.split()]

    def request(self, *more: str, **how) -> dict:
        return {"script": self.script, "arguments": [*self.arguments, *more], "log": str(self.log), **how}

    def run(self, *more: str, code: int | None = 0, **how) -> str:
        """Runs the command with `more` arguments, expects an exit code, and returns its output."""
        ran = self.server(**self.request(*more, **how))
        assert code is None or ran["code"] == code, ran["output"]
        self.code, self.seconds = ran["code"], ran["seconds"]
        return ran["output"]

    def killed(self, *more: str, **how) -> None:
        """Runs the command, which a SIGKILL ends."""
        how = {**how, "signal": signal.SIGKILL} if "step" in how else how
        self.run(*more, code=-signal.SIGKILL, **how)

    def folder(self) -> Path:
        return next(self.out.glob(FOLDERS[self.number]))

    def checkpoints(self) -> list[Path]:
        return sorted(self.folder().glob("state_*/step_*.pt"))

    def results(self) -> dict[str, bytes | str]:
        """Name -> content of what the stage has made; seconds, and the pages that tell them, are left out."""
        folder, found = self.folder(), {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.suffix == ".json" and path.parent == folder:
                found[name] = json.dumps(json.loads(path.read_text())["metrics"])
            elif path.suffix == ".csv":
                table = pd.read_csv(path)
                found[name] = table[[c for c in table if not c.startswith("seconds_")]].to_csv()
            elif (
                path.is_file()
                and path.suffix not in (".png", ".html")
                and path.name not in ("README.md", "adapter_config.json")
            ):
                found[name] = path.read_bytes()
        return found

    def differs(self, expected: dict[str, bytes | str]) -> dict[str, str]:
        """Name -> how that file of the results differs; pytest's own comparison of large files takes minutes."""
        found, differences = self.results(), {}
        for name in sorted(found.keys() | expected.keys()):
            if name not in found or name not in expected:
                differences[name] = "missing" if name in expected else "left over"
            elif found[name] != expected[name]:
                is_text = isinstance(found[name], str)
                differences[name] = f"{found[name]}\nexpected {expected[name]}" if is_text else "other bytes"
        return differences


@pytest.fixture(scope="module")
def whole(server, corpus):
    """The three stages, uninterrupted; of each its results, seconds, points of writing, and a checkpoint's size."""
    found = {}
    for number in STAGES:
        stage = found[number] = Stage(server, number, corpus, corpus / "out")
        output = stage.run()
        stage.expected = stage.results()
        stage.points, stage.largest = map(int, re.search(r"POINTS (\d+) LARGEST (\d+)", output).groups())
        assert stage.largest > 10_000  # the server sees the checkpoints that are written
    return found


@pytest.fixture
def begin(server, corpus, whole, tmp_path):
    """(stage, words, name of a folder) -> the stage in a new output folder."""

    def make(number: int, words: str = "", folder: str = "out", **more) -> Stage:
        out = tmp_path / folder
        out.mkdir(parents=True)
        for earlier in range(1, number):
            shutil.copytree(whole[earlier].folder(), out / whole[earlier].folder().name)
        return Stage(server, number, corpus, out, words, **more)

    return make


@pytest.mark.parametrize(
    ("number", "best"), [(1, "model.safetensors"), (2, "reward1_geli"), (3, "adapter_model.safetensors")]
)
def test_a_killed_run_ends_as_if_nothing_had_happened(number, best, begin, whole):
    stage = begin(number)
    stage.killed(step=1)  # before the first checkpoint
    stage.killed("--resume", step=3)  # between two checkpoints
    stage.killed("--resume", torn="step_00000004.pt")
    assert [path.name for path in stage.checkpoints()] == ["step_00000002.pt"]
    stage.killed("--resume", torn=best)
    output = stage.run("--resume")
    assert "Resuming after step" in output and "is skipped" not in output
    assert not stage.differs(whole[number].expected)
    assert not [path for path in stage.out.rglob(".*") if path.is_file()]  # nothing temporary stays


@pytest.mark.parametrize("words", ["--freeze_layers 1 --patience 1 --epochs 5", "--freeze_layers 1"])
def test_frozen_layers_and_patience_survive_a_kill(words, begin):
    stages = [begin(1, words, folder) for folder in "ab"]
    stages[0].run()
    stages[1].killed(step=3)
    assert "Resuming after step" in stages[1].run("--resume")
    assert not stages[1].differs(stages[0].results())


@pytest.mark.skipif(not RANDOM_KILLS, reason="takes minutes: set GELI_KILLS=20, as .ci/run does")
@pytest.mark.parametrize("number", STAGES)
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(number, begin, whole):
    rng, kills, resumed, finished = random.Random(number), 0, 0, 0
    stage = begin(number, folder="0")
    while True:
        how = {}
        if kills < RANDOM_KILLS:
            random_time = {"seconds": rng.uniform(0.2, whole[number].seconds)}
            how = random_time if kills % 2 else {"event": rng.randint(1, whole[number].points // 3)}
        resumed += "Resuming after step" in stage.run("--resume", code=None, **how)
        if stage.code == -signal.SIGKILL:
            kills += 1
            continue
        assert stage.code == 0 and not stage.differs(whole[number].expected)
        assert not [path for path in stage.out.rglob(".*") if path.is_file()]
        if kills == RANDOM_KILLS:
            break
        finished += 1
        stage = begin(number, folder=str(finished))
    assert resumed >= RANDOM_KILLS // 3


@pytest.mark.parametrize("number", STAGES)
def test_a_full_disk_is_named_and_what_was_kept_goes_on(number, server, begin, whole, tmp_path):
    if not server.mounts:
        pytest.skip("this system lets nobody but root mount a file system")
    stage, disk = begin(number, folder="disk"), tmp_path / "disk"
    stage.killed(step=3)
    pages = sum(-(-path.stat().st_size // 4096) for path in disk.rglob("*") if path.is_file())
    room = 4096 * pages + whole[number].largest // 2  # the next checkpoint does not fit before the last is removed
    copied = f"cp -r {disk} {tmp_path}/copy && mount -t tmpfs -o size={room} none {disk}"
    assert server(shell=f"{copied} && cp -r {tmp_path}/copy/. {disk}")["code"] == 0
    output = stage.run("--resume", code=2)
    error = next(line for line in output.splitlines() if ": error: " in line)
    assert str(disk) in error and "No space left on device" in error
    assert re.search(r"the checkpoint after step \d+ of \d+ is kept in .*/state_.*--resume", error)
    assert server(shell=f"mount -o remount,size=1g {disk}")["code"] == 0
    assert "Resuming after step" in stage.run("--resume")
    assert server(shell=f"cp -r {disk} {tmp_path}/left && umount {disk}")["code"] == 0
    stage.out = tmp_path / "left"
    assert not stage.differs(whole[number].expected)


@pytest.mark.parametrize(
    ("number", "sent", "code"), [(1, signal.SIGTERM, 143), (2, signal.SIGINT, 130), (3, signal.SIGTERM, 143)]
)
def test_a_signal_ends_the_step_and_says_how_to_go_on(number, sent, code, begin):
    stage = begin(number)
    output = stage.run(code=code, step=5, signal=sent)
    assert re.search(rf"stopped by {sent.name} after step 5 of .*the checkpoint after step 5 of .*--resume", output)
    assert [path.name for path in stage.checkpoints()] == ["step_00000004.pt", "step_00000005.pt"]  # the newest two


def test_a_run_goes_on_with_its_own_options_and_data_only(begin, whole, corpus, tmp_path):
    stage = begin(2)
    stage.killed(step=5)
    output = stage.run("--resume", "--seed", "1", code=2)
    assert "state_geli was started with --seed 0, not 1" in output
    other = tmp_path / "candor"
    shutil.copytree(corpus / "candor", other)
    transcript = next(other.rglob("transcript_cliffhanger.csv"))
    transcript.write_text(transcript.read_text().replace("I", "We", 1))
    assert "not the same data" in stage.run("--resume", "--data_dir", str(other), code=2)
    output = stage.run(code=2)
    assert "has a run of that name already" in output and "--resume" in output
    # its newest checkpoint is damaged, and it is found without its name
    damaged, before = stage.checkpoints()[-1], stage.checkpoints()[-2]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    stage.arguments = [word for word in stage.arguments if word not in ("--run_name", "geli")]
    output = stage.run("--resume")
    assert f"Checkpoint {damaged} is skipped" in output and f": {before}" in output
    assert not stage.differs(whole[2].expected)
    assert "the run geli is complete already" in stage.run("--resume", "--run_name", "geli")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1, "--contrastive --curriculum_exposure"),
        (2, "--unfreeze --contrastive --curriculum_exposure"),
        (2, "--redist_type RUDDER"),
        (2, "--heads 2 --decorrelate 1"),
        (3, "--reward random --sft_steps 2"),
    ],
)
def test_other_options_go_on_as_well(number, words, begin):
    uninterrupted, stage = (begin(number, words, folder) for folder in ("whole", "killed"))
    left_out = {1: "--val", 2: "--small_model_shrink" if "RUDDER" in words else None}.get(number)
    for each in (uninterrupted, stage) if left_out else ():
        each.arguments.remove(left_out)
    uninterrupted.run()
    stage.killed(step=5)
    assert "Resuming after step 4 of" in stage.run("--resume")
    assert not stage.differs(uninterrupted.results())


def test_a_run_that_died_before_it_had_a_checkpoint_does_not_hold_its_name(begin):
    stage = begin(2)
    asked = stage.arguments
    stage.arguments = [word for word in asked if word != "--small_model_shrink"]  # as stage 1's head is
    assert "ask for default" in stage.run(code=2)
    assert (stage.folder() / "state_geli").is_dir() and not stage.checkpoints()
    stage.arguments = asked
    stage.killed(step=1)  # it has begun


def test_resume_without_a_name_leaves_other_runs_alone(begin):
    stage = begin(2, name=False)
    stage.killed("--seed", "1", step=3)
    left = stage.checkpoints()
    output = stage.run("--resume")
    assert "was started with --seed 1, not 0" in output and "starting from the beginning" in output
    assert stage.checkpoints() == left and len(left) == 1


def test_what_is_left_of_a_finished_runs_folder_does_not_begin_it_again(tmp_path):
    arguments = {"resume": True, "run_name": "mine", "seed": 0}
    removed = tmp_path / ".state_mine.0123456789abcdef.tmp"  # it was killed while it removed this
    for folder in (tmp_path / "state_mine", removed):
        folder.mkdir()
    (removed / "run.json").touch()
    (tmp_path / "reward1_mine.json").write_text(json.dumps({"arguments": arguments}))
    with pytest.raises(SystemExit) as complete:
        reward_run_to_resume(arguments, tmp_path)
    assert complete.value.code == 0 and not removed.exists()


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


@pytest.mark.parametrize(("number", "words"), [(1, ""), (2, "--lambda 1"), (3, "")])
def test_what_is_not_finite_ends_the_run_and_names_the_batch(number, words, begin, corpus):
    stage = begin(number, f"--learning_rate 1e30 {words}")
    found = re.search(r"not finite at step (\d+) \(batch: .*checkpoint after step (\d+) of", stage.run(code=2))
    assert int(found[1]) == int(found[2]) + 1
    batch = json.loads(next(stage.out.rglob("not_finite.json")).read_text())["batch"]
    assert batch and all(name.split("/")[0] in {p.name for p in (corpus / "candor").iterdir()} for name in batch)


def test_a_reward_that_is_not_finite_leaves_the_policy_alone(corpus):
    policy = load_policy(str(corpus / "models" / "llama"), Adapter(4, 8), torch.float32)
    scores = iter([torch.ones(4), torch.ones(4), torch.tensor([1.0, float("nan"), 1.0, 1.0]), torch.ones(4)])
    ppo = PPO(
        policy,
        lambda _, texts: next(scores)[: len(texts)],
        PPOConfig(batch_size=4, min_new_tokens=4, max_new_tokens=8),
        Accelerator(cpu=True),
        0,
    )
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


def test_two_runs_in_one_folder_at_once_do_not_disturb_each_other(server, begin, whole, tmp_path):
    stage = begin(2, name=False)
    both = server(together=[{**stage.request(), "log": str(tmp_path / f"{i}.log")} for i in range(2)])["together"]
    assert [ran["code"] for ran in both] == [0, 0], both
    found, expected = stage.results(), whole[2].expected
    for kind, suffix in (("reward1", ""), ("val_turn_rewards", ".csv")):
        names = [name for name in found if name.startswith(kind) and Path(name).suffix == suffix]
        assert len(names) == 2 and all(found[name] == expected[f"{kind}_geli{suffix}"] for name in names)


def test_stage_3_leaves_a_living_runs_files_alone_and_moves_a_dead_ones_aside(begin):
    stage = begin(3)
    stage.killed(step=5)
    living = RunLock(stage.folder(), "GELI_llama", re.compile(""), resume=True)
    assert "is being trained by another process" in stage.run(code=2)
    left = sorted(path.name for path in living.unfinished())
    assert left[0] == "run.json" and left[-1].startswith("step_")
    living.release()  # it dies
    stage.killed(step=1)
    assert "its checkpoints (it is unfinished) are now in" in stage.log.read_text()
    aside = stage.folder() / "GELI_llama.earlier-1" / "state_GELI_llama"
    assert sorted(path.name for path in aside.iterdir()) == left and not stage.checkpoints()
