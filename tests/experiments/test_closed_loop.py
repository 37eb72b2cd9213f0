"""The closed loop on a small corpus with small models: it runs, resumes, and its intervals are right."""

import json
import math
from pathlib import Path

import pytest
from conftest import call_script
from small_models import chat_model

import train_rl_GELI
from experiments import closed_loop as command
from experiments import loop as closed_loop
from experiments.best_of import best_of
from experiments.loop import PolicyRun, checkpoint_at
from experiments.loop_options import LoopOptions
from experiments.loop_report import gains, phrases
from tools.hidden_reward import hidden_reward


@pytest.fixture(scope="module")
def looped(sample, tiny, tmp_path_factory):
    """The folder of a closed loop with one seed, and what it printed."""
    folder = tmp_path_factory.mktemp("loop")
    chat_model(tiny / "llama", folder / "llama")
    arguments = ["experiments/closed_loop.py", folder / "out", "--data_dir", sample, "--encoder", tiny / "bart"]
    arguments += ["--policy", folder / "llama", "--seeds", 0, "--steps", 2, "--prompts", 6]
    arguments += ["--algorithms", "ppo", "best-of-2"]

    def run_here(options, script, *more):
        """Runs a command in this process, with less work."""
        lighter = {"--epochs": 1, "--train_size": 4, "--steps": 2}
        words = [lighter.get(before, word) for before, word in zip(("", *more), more, strict=False)]
        commands.append([script, *words])
        call_script(script, *words)

    commands = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closed_loop, "run_command", run_here)
        patch.setattr(closed_loop, "REWARDS", ("GELI", "truth"))
        patch.setenv("WANDB_MODE", "disabled")
        printed = [call_script("experiments/closed_loop.py", *arguments[1:]).stdout for _ in range(2)]
    return folder / "out", printed, commands


def test_every_reward_is_in_the_table_and_nothing_is_run_twice(looped):
    out, printed, commands = looped
    assert printed[0].count("policy ") == 4 and "policy " not in printed[1]
    table = (out / "closed_loop.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in table[1:]] == [
        [r, a] for a in ("ppo", "best-of-2") for r in ("GELI", "truth")
    ]
    scripts = [script for script, *_ in commands]
    assert scripts.count("train_rl_GELI.py") == 2 and scripts.count("tools/plant_truth.py") == 1
    assert (out / "closed_loop.png").stat().st_size > 5_000


def test_a_result_is_that_of_the_responses(looped):
    out, _, _ = looped
    reference = json.loads((out / "results" / "reference-0.json").read_text())
    found = json.loads((out / "results" / "truth-ppo-0.json").read_text())
    assert len(found["gold"]) == len(found["texts"]) == len(reference["gold"]) == 6
    assert found["prompts"] == reference["prompts"]
    assert [row["step"] for row in found["steps"]] == [1, 2]
    first = found["steps"][0]
    assert first["gold_mean"] == pytest.approx(first["score_mean"], abs=1e-4)  # it is trained on the truth


def test_the_hidden_reward_chooses_the_best_of_n(looped):
    out, _, _ = looped
    samples = [json.loads((out / "samples" / "0" / f"{k}.json").read_text())["texts"] for k in (0, 1)]
    found = json.loads((out / "results" / "truth-best-of-2-0.json").read_text())
    assert samples[0] != samples[1]
    assert found["gold"] == [max(map(hidden_reward, both)) for both in zip(*samples, strict=True)]


def test_best_of_n_by_hand():
    samples = [
        {"texts": ["great", "no"], "ended": [True, True]},
        {"texts": ["awful thing", "no"], "ended": [False, True]},
    ]
    found = best_of(samples, lambda prompts, texts: [len(text) for text in texts], ["a", "b"])
    assert found["texts"] == ["awful thing", "no"] and found["ended_share"] == 0.5 and found["response_words"] == 1.5
    assert found["order"] == pytest.approx(-1)  # the longer text is the colder; the second prompt has no order
    assert found["kl"] == pytest.approx(math.log(2) - 0.5)


def test_the_checkpoint_closest_to_the_kl_is_chosen():
    steps = [{"step": i, "kl": float(i)} for i in range(1, 31)]
    assert checkpoint_at(steps, 12.6) == 11  # steps 12 and 13 have the mean 12.5
    assert checkpoint_at(steps, 100.0) == 29 and checkpoint_at(steps[:1], 5.0) == 1


def results(*golds, reference=(0.1, 0.2, 0.3)):
    """Results of seeds 0, 1, … with these hidden rewards, and their references."""
    shared = {"reward": "GELI", "algo": "ppo", "prompts": ["a/0/1", "a/1/2", "b/0/1"]}
    shared["texts"] = ["Nice!", "no", "so nice"]
    runs = [{**shared, "seed": i, "gold": list(gold)} for i, gold in enumerate(golds)]
    return runs, {i: {"gold": list(reference), "texts": ["no", "no", "so"]} for i in range(len(golds))}


def test_gains_are_paired_by_prompt():
    found = gains(*results((0.2, 0.5, 0.1), (0.1, 0.2, 0.3)))
    assert found.values == pytest.approx([0.2 / 3, 0]) and found.conversations == 2
    # a conversation drawn twice: (0.1 + 0.3) / 2, or -0.2; one each: the mean over prompts
    assert set(found.samples[0].round(6)) == {0.2, -0.2, round(0.2 / 3, 6)} and not found.samples[1].any()
    assert found.interval().value == pytest.approx(0.1 / 3) and found.interval(found) == (0, 0, 0)


def test_words_are_listed_by_the_change_of_their_share():
    (row,) = phrases(*results((0.2, 0.5, 0.1)))
    assert row["more often"].startswith("nice +67, ! +33") and row["less often"].startswith("no -33")


def test_the_command_line_has_the_defaults_of_the_options(monkeypatch):
    seen = []
    monkeypatch.setattr(command, "closed_loop", seen.append)
    command.main(command.parse_options(["out", "--data_dir", "d", "--encoder", "e"]))
    assert seen == [LoopOptions(Path("out"), "d", "e")]


@pytest.mark.parametrize("algo", ["ppo", "rloo", "grpo"])
def test_stage_3_takes_the_options_of_every_algorithm(algo, tmp_path):
    options = LoopOptions(out=tmp_path, data_dir="", encoder="")
    _, *words = closed_loop.policy_command(options, PolicyRun("random", algo, 0))
    assert train_rl_GELI.parse_options(list(map(str, words))).rl.algo == algo


def test_every_reward_is_tried_before_the_other_algorithms():
    options = LoopOptions(out=None, data_dir="", encoder="", seeds=(3, 4))
    runs = list(closed_loop.policy_runs(options))
    assert len(runs) == 24 and runs[0] == PolicyRun("GELI", "ppo", 3) and runs[5] == PolicyRun("GELI", "ppo", 4)
    assert [run.reward for run in runs[10:15]] == list(closed_loop.REWARDS) and runs[10].algo == "best-of-8"
    assert runs[15:17] == [PolicyRun("GELI", "rloo", 3), PolicyRun("GELI", "grpo", 3)]
