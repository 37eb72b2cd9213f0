"""A restored run continues bit for bit; damaged and foreign files are skipped; a run's name has one owner."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn
from transformers.optimization import Adafactor

from geli.run.checkpoint import Checkpointer, _plain, _read
from geli.run.errors import Stopped, UserError
from geli.run.lock import RunLock, list_checkpoints, lock_new_run, reward_run_to_resume

STEPS = 8


class Encoder(nn.Module):
    """A frozen layer that a second name shares, a trained layer, and one that gets no gradient before step 3."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.frozen.weight.copy_(torch.arange(16).view(4, 4) / 16)  # the same in every run, as pretrained weights are
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.frozen.weight
        self.trained, self.late = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, late: bool):
        x = self.trained(self.tied(self.frozen(x))).relu()
        return x + self.late(x) if late else x


class Moments:
    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def adamw(encoder, head):
    groups = [{"params": list(head.parameters()), "lr": 1e-2}, {"params": encoder_parameters(encoder), "lr": 1e-3}]
    return torch.optim.AdamW(groups)


def adafactor(encoder, head):
    parameters = [*encoder_parameters(encoder), *head.parameters()]
    return Adafactor(parameters, lr=1e-2, scale_parameter=False, relative_step=False, warmup_init=False)


def encoder_parameters(encoder):
    return [p for p in encoder.parameters() if p.requires_grad]


class Run:
    """A small training run with everything that a checkpoint holds."""

    def __init__(self, folder, make_optimizer, seed=0, inputs="x", every=2, keep_copy=False, processes=1):
        torch.manual_seed(seed)
        self.encoder, self.head = Encoder(), nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = make_optimizer(self.encoder, self.head)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, total_iters=STEPS)
        self.best, self.moments = {"loss": None}, Moments()
        self.rng, self.sampling = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = RunLock(folder, "mine", re.compile("nothing"), resume=True)
        accelerator = Accelerator(cpu=True)
        if processes > 1:
            accelerator = SimpleNamespace(num_processes=processes, process_index=0, device=accelerator.device)
        self.checkpointer = Checkpointer(
            self.lock, accelerator, modules={"encoder": self.encoder, "head": self.head}, optimizer=self.optimizer,
            values={"schedule": self.schedule, "best": self.best, "moments": self.moments},
            generators={"training": self.rng, "sampling": self.sampling}, inputs={"data": inputs}, every=every,
            total=STEPS, keep_copy=keep_copy,
        )  # fmt: skip

    def step(self, step):
        x = torch.from_numpy(self.rng.standard_normal((5, 4))).float() + torch.rand(4, generator=self.sampling)
        x = x + float(np.random.rand())
        loss = self.head(self.encoder(x, late=step >= 3)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.best["loss"], self.moments.count = np.float64(loss.item()), step

    def train(self, steps=STEPS):
        first = self.checkpointer.restore()
        with self.checkpointer.watch():
            for step in range(first + 1, steps + 1):
                self.step(step)
                self.checkpointer.done(step)
        self.lock.release()
        return self

    def result(self) -> list:
        """Every bit of what training may change."""
        tensors = [*self.encoder.state_dict().values(), *self.head.state_dict().values()]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        states = [self.optimizer.state.get(p) for p in parameters]
        for state in states:
            tensors += [torch.as_tensor(value) for value in (state or {}).values()]
        return [
            [tensor.clone().view(-1).tolist() for tensor in tensors],
            [state and list(state) for state in states],
            [group["lr"] for group in self.optimizer.param_groups],
            self.schedule.last_epoch, float(self.best["loss"]), self.moments.count,
            self.rng.random(), torch.rand(1, generator=self.sampling).item(), torch.rand(1).item(), np.random.rand(),
        ]  # fmt: skip


@pytest.fixture(autouse=True)
def global_generators():
    np.random.seed(0)


@pytest.mark.parametrize("make_optimizer", [adamw, adafactor])
@pytest.mark.parametrize("keep_copy", [False, True])
@pytest.mark.parametrize("stop", range(1, STEPS))  # up to 2, some parameters have no optimizer state
def test_a_restored_run_ends_as_an_uninterrupted_one(make_optimizer, keep_copy, stop, tmp_path):
    whole = Run(tmp_path / "whole", make_optimizer, every=1).train().result()
    np.random.seed(0)
    Run(tmp_path / "stopped", make_optimizer, every=1, keep_copy=keep_copy).train(stop)
    np.random.seed(1)
    resumed = Run(tmp_path / "stopped", make_optimizer, seed=1, every=1, keep_copy=keep_copy).train().result()
    assert resumed == whole


def test_the_two_newest_checkpoints_are_kept_without_frozen_weights(tmp_path):
    run = Run(tmp_path, adamw).train()
    paths = list_checkpoints(run.lock.folder)
    assert [path.name for path in paths] == ["step_00000006.pt", "step_00000008.pt"]
    names = {f"encoder.{layer}.{kind}" for layer in ("trained", "late") for kind in ("weight", "bias")}
    names |= {f"head.{name}" for name in run.head.state_dict()}
    assert _read(paths[0])["modules"].keys() == names


def test_a_run_that_fails_in_its_first_step_is_resumed_from_the_beginning(tmp_path):
    whole = Run(tmp_path / "whole", adamw).train().result()
    np.random.seed(0)
    run = Run(tmp_path / "failed", adamw)
    with pytest.raises(UserError, match=r"loss is not finite at step 1 .*a, b, c, ….*checkpoint after step 0 of 8.*"), \
            run.checkpointer.watch():  # fmt: skip
        run.checkpointer.restore()
        run.checkpointer.not_finite("the loss", 1, list("abcd"))
    run.lock.release()
    assert json.loads((run.lock.folder / "not_finite.json").read_text())["batch"] == list("abcd")
    assert Run(tmp_path / "failed", adamw, seed=1).train().result() == whole


def test_a_failing_step_does_not_change_the_copy_that_is_kept(tmp_path):
    whole = Run(tmp_path / "whole", adafactor).train().result()
    np.random.seed(0)
    run = Run(tmp_path / "failed", adafactor, every=100, keep_copy=True)
    run.checkpointer.restore()
    for step in (1, 2, 3):
        run.step(step)
        run.checkpointer.done(step)
    run.step(4)
    with pytest.raises(UserError):
        run.checkpointer.not_finite("a score", 4, [])
    run.lock.release()
    assert Run(tmp_path / "failed", adafactor, seed=1).train().result() == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step(number, tmp_path):
    run = Run(tmp_path, adamw, every=100)
    with pytest.raises(Stopped) as stopped, run.checkpointer.watch():
        run.checkpointer.restore()
        os.kill(os.getpid(), number)
        run.step(1)
        run.checkpointer.done(1)
    assert stopped.value.code == 128 + number
    assert re.search(
        rf"stopped by {number.name} after step 1 of 8; the checkpoint after step 1 of 8 .*--resume",
        stopped.value.message,
    )
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    assert len(list_checkpoints(run.lock.folder)) == 1


@pytest.mark.parametrize(("keep_copy", "every"), [(True, 100), (False, 1)])
def test_sigterm_gives_up_a_step_where_the_state_before_it_is_kept(keep_copy, every, tmp_path):
    whole = Run(tmp_path / "whole", adafactor).train().result()
    np.random.seed(0)
    run = Run(tmp_path / "stopped", adafactor, every=every, keep_copy=keep_copy)
    run.checkpointer.restore()
    with pytest.raises(Stopped) as stopped, run.checkpointer.watch():
        for step in (1, 2, 3):
            with run.checkpointer.step():
                run.step(step)
                if step == 3:  # its parameters have changed already
                    os.kill(os.getpid(), signal.SIGTERM)
                    pytest.fail("the step goes on")
            run.checkpointer.done(step)
    assert re.search("stopped by SIGTERM after step 2 of 8; .* after step 2 of 8 .*--resume", stopped.value.message)
    assert stopped.value.code == 143
    run.lock.release()
    assert Run(tmp_path / "stopped", adafactor, seed=1).train().result() == whole


def test_sigterm_waits_for_a_step_that_would_lose_others(tmp_path, capfd):
    run = Run(tmp_path, adamw, every=100)
    run.checkpointer.restore()
    with pytest.raises(Stopped) as stopped, run.checkpointer.watch():
        for step in (1, 2):
            with run.checkpointer.step():
                run.step(step)
                os.kill(os.getpid(), signal.SIGTERM if step == 2 else 0)
            run.checkpointer.done(step)
    assert "stopped by SIGTERM after step 2 of 8" in stopped.value.message
    assert capfd.readouterr().err == "\nStopping after this step; Ctrl-C again stops now.\n"


def test_a_second_ctrl_c_ends_the_step_and_says_how_to_go_on(tmp_path, monkeypatch, capfd):
    run, now = Run(tmp_path, adamw, every=1), [10.0]
    monkeypatch.setattr("geli.run.checkpoint.time.monotonic", lambda: now[0])
    run.checkpointer.restore()
    with pytest.raises(Stopped) as stopped, run.checkpointer.watch():
        run.step(1)
        run.checkpointer.done(1)
        with run.checkpointer.step():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # as a launcher repeats it
            assert "Ctrl-C again stops now" in capfd.readouterr().err
            now[0] += 2
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the step goes on")
    assert re.search("stopped within a step; the checkpoint after step 1 of 8 .*--resume", stopped.value.message)
    assert stopped.value.code == 130


def test_damage_anywhere_is_noticed(tmp_path):
    expected = {"format": "geli-checkpoint-1", "step": 1, "modules": {}, "optimizer": {}, "values": {}, "random": []}
    expected |= {"inputs": {"data": "abc"}, "numbers": torch.arange(20)}
    torch.save(expected, tmp_path / "x")
    content, noticed = (tmp_path / "x").read_bytes(), 0
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        (tmp_path / "y").write_bytes(damaged)
        try:
            found = _read(tmp_path / "y")
        except Exception:
            noticed += 1
        else:  # in padding, or in a field that is not used
            assert repr(found) == repr(expected)
    assert noticed > len(content) / 6
    (tmp_path / "y").write_bytes(content[: len(content) // 2])
    with pytest.raises(zipfile.BadZipFile):
        _read(tmp_path / "y")


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, capsys):
    whole = Run(tmp_path / "whole", adamw).train().result()
    np.random.seed(0)
    older, newer = list_checkpoints(Run(tmp_path / "damaged", adamw).train(6).lock.folder)
    content = bytearray(newer.read_bytes())
    content[len(content) // 2] ^= 1
    newer.write_bytes(content)
    assert Run(tmp_path / "damaged", adamw, seed=1).train().result() == whole
    printed = capsys.readouterr().out
    assert f"Checkpoint {newer} is skipped: its content is not what was written" in printed
    assert f"Resuming after step 4 of 8: {older}" in printed


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_a_foreign_file_is_skipped_and_not_executed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = Run(tmp_path, adamw).train(2).lock.folder
    torch.save({"format": "geli-checkpoint-1", "step": 90, "x": Bomb()}, folder / "step_00000090.pt")
    torch.save({"step": 91}, folder / "step_00000091.pt")
    torch.save([1], folder / "step_00000092.pt")
    torch.save({"format": "geli-checkpoint-1", "step": 93}, folder / "step_00000093.pt")
    (folder / "step_00000094.pt").write_bytes(pickle.dumps(Bomb()))
    save_file({"x": torch.zeros(2)}, folder / "step_00000095.pt")
    (folder / "step_00000096.pt").touch()
    (folder / "step_00000097.pt").mkdir()
    run = Run(tmp_path, adamw)
    assert run.checkpointer.restore() == 2
    assert not Path("executed").exists()
    assert capsys.readouterr().out.count("is skipped") == 8


def test_a_run_is_resumed_with_the_same_inputs_processes_and_shapes_only(tmp_path):
    run = Run(tmp_path, adamw).train(2)
    for changed, message in {
        "inputs": "not the same data as when",
        "processes": "was written by 1 processes: expected as many, found 2",
    }.items():
        run = Run(tmp_path, adamw, **{changed: {"inputs": "y", "processes": 2}[changed]})
        with pytest.raises(UserError, match=message):
            run.checkpointer.restore()
        run.lock.release()
    run = Run(tmp_path, adamw)
    run.checkpointer.model["head"][2] = nn.Linear(8, 2)
    with pytest.raises(
        UserError, match=r"fit this run \(head.2.weight: expected the shape \(2, 8\), found \(1, 8\)\); start"
    ):
        run.checkpointer.restore()
    run.checkpointer.model["head"][2] = nn.Linear(8, 1)
    run.checkpointer.model["extra"] = nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"fit this run \(extra.weight: expected the shape \(1, 1\), found None\)"):
        run.checkpointer.restore()


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_kept(tmp_path, monkeypatch):
    run = Run(tmp_path, adamw).train(2)

    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"step_00000003.pt: could not be written .*; the checkpoint after step 2 "), \
            run.checkpointer.watch():  # fmt: skip
        run.checkpointer.done(3, save=True)
    assert [path.name for path in list_checkpoints(run.lock.folder)] == ["step_00000002.pt"]


def test_values_that_could_not_be_loaded_are_refused():
    plain = _plain({"a": np.float64(0.1), "b": [np.arange(2), (None, "x")], 3: torch.ones(1)}, torch.clone)
    assert plain == {"a": 0.1, "b": [[0, 1], (None, "x")], 3: torch.ones(1)} and type(plain["a"]) is float
    with pytest.raises(TypeError, match="a checkpoint cannot hold a "):
        _plain({"path": Path()}, torch.clone)


# ---------------------------------------------------------------------------------------------------------------------
# The lock


def test_a_name_belongs_to_one_living_run(tmp_path):
    first = lock_new_run(tmp_path, "mine")
    with pytest.raises(UserError, match="is being trained by another process"):
        lock_new_run(tmp_path, "mine")
    with pytest.raises(UserError, match="is being trained by another process"):
        RunLock(tmp_path, "mine", re.compile(""), resume=True)
    names = {lock_new_run(tmp_path).name for _ in range(30)}
    assert len(names) == 30 and "mine" not in names
    (tmp_path / "reward1_mine.json").write_text("{}")
    first.remove()  # finished
    assert not (tmp_path / "state_mine").exists()
    (tmp_path / "state_mine").mkdir()  # or killed while it was removing this
    with pytest.raises(UserError, match="has a run of that name already"):
        lock_new_run(tmp_path, "mine")


def test_a_dead_process_lock_is_free(tmp_path):
    program = (
        "import re, sys, time; from pathlib import Path; from geli.run.lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1]), 'mine', re.compile('mine_.*'))\n"
        "print('locked', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="is being trained by another process"):
        lock_new_run(tmp_path, "mine")
    unfinished = tmp_path / f".mine_head.{'0' * 16}.tmp"
    unfinished.touch()
    process.kill()
    process.wait()
    lock = RunLock(tmp_path, "mine", re.compile("mine_.*"), resume=True)
    assert lock.unfinished() == [] and not unfinished.exists()


def test_a_run_is_resumed_with_its_own_options(tmp_path, capsys):
    arguments = {"resume": True, "run_name": None, "seed": 0, "device": "cpu", "path": Path("a")}
    lock = lock_new_run(tmp_path, "mine")
    lock.describe({"arguments": arguments, "wandb": {"id": "abc", "name": "other"}})
    (lock.folder / "step_00000002.pt").touch()
    assert reward_run_to_resume(arguments | {"resume": False}, tmp_path) is None
    assert reward_run_to_resume(arguments, tmp_path) is None  # it is living
    lock.release()
    resumed = reward_run_to_resume(arguments | {"device": "cuda"}, tmp_path)
    assert resumed.name == resumed.description["wandb"]["name"] == "mine"
    resumed.release()
    for changed, words in ({"seed": 1}, "--seed 0, not 1"), ({"new": 2}, "--new None, not 2"):
        assert reward_run_to_resume(arguments | changed, tmp_path) is None
        assert f"started with {words}" in capsys.readouterr().out
        with pytest.raises(UserError, match=re.escape(words)):
            reward_run_to_resume(arguments | changed | {"run_name": "mine"}, tmp_path)
    (lock.folder / "step_00000002.pt").unlink()  # nothing is lost by starting it again
    lock = reward_run_to_resume(arguments | {"seed": 1, "run_name": "mine"}, tmp_path)
    assert lock.name == "mine" and lock.description == {}


def test_a_finished_run_is_not_started_again(tmp_path):
    arguments = {"resume": True, "run_name": "mine", "seed": 0}
    (tmp_path / "state_mine").mkdir()
    (tmp_path / "reward1_mine.json").write_text(json.dumps({"arguments": arguments}))
    with pytest.raises(SystemExit) as finished:
        reward_run_to_resume(arguments, tmp_path)
    assert finished.value.code == 0
    with pytest.raises(UserError, match="is complete, and was started with --seed 0, not 1"):
        reward_run_to_resume(arguments | {"seed": 1}, tmp_path)


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
def test_a_hostile_description_of_a_run_is_ignored(content, tmp_path):
    (tmp_path / "state_x").mkdir()
    (tmp_path / "state_x" / "run.json").write_text(json.dumps(content))
    (tmp_path / "state_x" / "step_00000001.pt").touch()
    assert reward_run_to_resume({"resume": True, "run_name": None, "seed": 0}, tmp_path) is None
    assert RunLock(tmp_path, "x", re.compile(""), resume=True).description == {}
