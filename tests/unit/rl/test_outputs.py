"""The files of stage 3."""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from geli.rl import outputs
from geli.rl.outputs import Recorder
from geli.run.errors import UserError

FINE = dict(kl=4.0, entropy=3.0, cut_at_length_share=0.3, score_std=0.2, score_mean=0.1)


class FakePolicy:
    def save(self, folder, card):
        folder.mkdir()
        (folder / "README.md").write_text(card)


class FakeTracker:
    def __init__(self):
        self.logged = []

    def log(self, values, step):
        self.logged.append((step, values))


def card(name, measured) -> str:
    return f"{name}: {measured}"


def recorder(folder, steps=25, **more) -> Recorder:
    settings = dict(steps=steps, algo="ppo", save_every=10, target_kl_response=6.0, card=card, **more)
    return Recorder(FakePolicy(), FakeTracker(), folder, "GELI_llama", **settings)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("GELI_llama_sft", True),
        ("GELI_llama_20", True),
        ("GELI_llama_20_val.json", True),
        ("GELI_llama_20_val_responses.csv", True),
        ("GELI_llama_base.json", True),
        ("GELI_llama.json", True),
        ("GELI_llama_responses.csv", True),
        ("GELI_llama_steps.csv", True),
        ("GELI_llama_ppo.png", True),
        ("GELI_llama2.json", False),
        ("GELI_llama_ppo_off.json", False),
        ("GELI_llama.earlier-1", False),
        ("my_GELI_llama_20", False),
    ],
)
def test_the_names_of_a_runs_files(name, ours):
    assert bool(outputs.outputs_of("GELI_llama").fullmatch(name)) == ours


def test_a_checkpoint_every_10_steps_and_at_the_last(tmp_path):
    run = recorder(tmp_path)
    for step in range(1, 26):
        run.step(step, FINE)
        if step == 10:
            assert names(tmp_path) == ["GELI_llama_10", "GELI_llama_steps.csv"]
    written = run.finish()
    assert [path.name for path in written] == ["GELI_llama_25", "GELI_llama_steps.csv"]
    assert names(tmp_path) == sorted([*(path.name for path in written), "GELI_llama_10", "GELI_llama_20"])
    table = pd.read_csv(tmp_path / "GELI_llama_steps.csv")
    assert table["step"].tolist() == list(range(1, 26)) and (table["kl"] == 4).all()
    expected = FINE | {"efficiency": 0.0}
    assert run.tracker.logged[0] == (1, {f"ppo/{name}": value for name, value in expected.items()})
    run.step(26, FINE | {"score_mean": 0.7, "kl": 4.5})
    assert run.tracker.logged[-1][1]["ppo/efficiency"] == pytest.approx((0.7 - 0.1) / (0.2 * 3))


def test_a_run_that_changes_no_policy_saves_none(tmp_path):
    run = recorder(tmp_path, steps=1, saves=False)
    run.step(1, FINE)
    assert [path.name for path in run.finish()] == ["GELI_llama_steps.csv"]


def test_a_warning_is_given_once_a_run_even_if_it_is_resumed(tmp_path, monkeypatch):
    said = []
    run = recorder(tmp_path, steps=60)
    monkeypatch.setattr(run._bar, "write", said.append)
    for step in range(1, 31):
        run.step(step, FINE | {"kl": 100.0})
    assert len(said) == 1 and said[0].startswith("Step 20: KL runs away: 100.0 nats")
    resumed = recorder(tmp_path, steps=60)
    monkeypatch.setattr(resumed._bar, "write", said.append)
    resumed.load_state_dict(json.loads(json.dumps(run.state_dict())))
    assert resumed.checkpoint == tmp_path / "GELI_llama_30"
    resumed.step(31, FINE | {"kl": 100.0})
    assert len(said) == 1 and len(resumed.rows) == 31


def test_a_metric_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(UserError, match="not finite at step 1: kl, entropy; try a lower --learning_rate"):
        recorder(tmp_path).step(1, FINE | {"kl": float("nan"), "entropy": float("inf")})


def test_the_newest_checkpoint_has_the_most_steps(tmp_path):
    with pytest.raises(UserError, match="GELI_llama_STEP, found none: add --train"):
        outputs.newest_checkpoint(tmp_path, "GELI_llama")
    for step in ("9", "10", "sft", "²"):
        (tmp_path / f"GELI_llama_{step}").mkdir()
    assert outputs.newest_checkpoint(tmp_path, "GELI_llama") == tmp_path / "GELI_llama_10"


def adapter(folder, base) -> None:
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"lora_A": torch.zeros(4, 2)}, folder / "adapter_model.safetensors")


def base(folder) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_an_earlier_runs_outputs_are_moved_aside_and_its_adapters_name_their_model(tmp_path):
    for k in (1, 2):
        (tmp_path / "GELI_llama_sft").mkdir()
        adapter(tmp_path / "GELI_llama_10", tmp_path / "GELI_llama_sft")
        adapter(tmp_path / "GELI_llama_20", "huggyllama/llama-7b")
        (tmp_path / "other.json").touch()
        lock = outputs.lock_outputs(tmp_path, "GELI_llama")
        lock.remove()
        aside = tmp_path / f"GELI_llama.earlier-{k}"
        assert names(aside) == ["GELI_llama_10", "GELI_llama_20", "GELI_llama_sft"]
        assert base(aside / "GELI_llama_10") == str((aside / "GELI_llama_sft").resolve())
        assert base(aside / "GELI_llama_20") == "huggyllama/llama-7b"
    assert names(tmp_path) == ["GELI_llama.earlier-1", "GELI_llama.earlier-2", "other.json"]


def test_an_unfinished_runs_checkpoints_are_moved_aside_too(tmp_path, capsys):
    lock = outputs.lock_outputs(tmp_path, "GELI_llama")
    assert capsys.readouterr().out == "" and lock.unfinished() == []
    (lock.folder / "run.json").write_text("{}")
    lock.release()
    lock = outputs.lock_outputs(tmp_path, "GELI_llama")
    assert "An earlier run's 0 outputs of these names and its checkpoints (it is unfinished)" in capsys.readouterr().out
    assert lock.unfinished() == [] and lock.description == {}
    assert names(tmp_path / "GELI_llama.earlier-1" / lock.folder.name) == ["run.json"]
    lock.remove()


def test_a_checkpoint_is_loaded_on_the_sft_model_that_it_was_trained_on(tmp_path):
    sft_model = tmp_path / "GELI_llama_sft"
    adapter(tmp_path / "plain", "huggyllama/llama-7b")
    adapter(tmp_path / "warm", "/elsewhere/GELI_llama_sft")
    assert outputs.base_of(tmp_path / "plain", sft_model) is None
    with pytest.raises(UserError, match="which is not there: put it back, or train again"):
        outputs.base_of(tmp_path / "warm", sft_model)
    sft_model.mkdir()
    assert outputs.base_of(tmp_path / "warm", sft_model) == str(sft_model.resolve())
