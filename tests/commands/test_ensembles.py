"""`--heads` and `--decorrelate` through the commands: training, evaluation, stage 3 and `GELIReward`."""

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from conftest import call_script, with_sizes
from no_pictures import without_pictures
from turn_sets import trajectory, turn_set

from data_utils import TurnSet, read_corpus, split
from geli.data.words import SURFACE
from geli.heads import load_reward_head
from geli.reward import GELIReward
from models import RewardHeadConfig, head_rewards, new_reward_head
from train_reward_GELI import GELITraining, GELITrainingOptions

QUICK = ("--context_turns", 2, "--learning_rate", 1e-3, "--train_size", 6, "--small_model_shrink", "--epochs", 2)


class Runs:
    """Runs in one output folder, with stage 1's run `li`."""

    def __init__(self, folder, sample, tiny):
        self.folder, self.data, self.tiny = folder, ("--data_dir", sample, "--output_dir", folder), tiny
        self.encoder = ("--lang_model_path", tiny / "bart")
        call_script("train_reward_LI_only.py", *self.data, *self.encoder, *QUICK, "--run_name", "li")

    def stage_2(self, run, *more, check=0):
        start = () if "--affect_path" in more else self.encoder
        words = (*self.data, *start, *QUICK, "--train", "--val", "--run_name", run, *more)
        return call_script("train_reward_GELI.py", *words, check=check)

    def stage_3(self, *more, check=0):
        sizes = with_sizes(more, steps=1, batch_size=2, val_prompts=4)
        model = ("--model_name", self.tiny / "llama", "--context_turns", 2, "--min_new_tokens", 4)
        return call_script("train_rl_GELI.py", *self.data, *model, "--max_new_tokens", 8, *sizes, check=check)

    def path(self, run):
        return next(self.folder.glob(f"*/reward1_{run}"))

    def record(self, run):
        return json.loads(next(self.folder.glob(f"*/reward1_{run}.json")).read_text())

    def rewards(self, run):
        return pd.read_csv(next(self.folder.glob(f"*/val_turn_rewards_{run}.csv")))["reward"].to_numpy()


@pytest.fixture(scope="module")
def runs(sample, tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        without_pictures(patch)
        found = Runs(tmp_path_factory.mktemp("runs"), sample, tiny)
        found.stage_2("one")
        found.stage_2("three", "--heads", 3)
        found.stage_2("geli", "--heads", 2, "--affect_path", "li")
        yield found


PROMPTS, RESPONSES = ["Hello there.", "I lost my job."], ["Oh, really?", "I am so sorry!"]


def test_the_first_head_draws_what_a_head_alone_draws():
    assert np.random.default_rng([7, 0]).random() == np.random.default_rng(7).random()
    assert np.random.default_rng([7, 1]).random() not in (np.random.default_rng(seed).random() for seed in (1, 7, 8))


def test_heads_differ_and_are_measured_by_their_mean(runs):
    head, record = load_reward_head(runs.path("three")), runs.record("three")
    assert head.config.members == record["arguments"]["heads"] == 3
    first = [member.layers[0].weight for member in head.members]
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    words = ("--val", "--reward_path", runs.path("three"), "--train_size", 6, "--run_name", "again")
    call_script("train_reward_GELI.py", *runs.data, *words)
    assert runs.record("again")["metrics"]["validation"] == record["metrics"]["validation"]
    call_script("tools/evaluate_rewards.py", "three", "one", *runs.data, "--repetitions", 20)
    table = pd.read_csv(runs.folder / "rewards.csv").set_index(["reward", "metric"])
    for run in ("three", "one"):
        measured = runs.record(run)["metrics"]["validation"]["ge_loss"]
        assert table.loc[(run, "ge_loss"), "value"] == pytest.approx(measured, rel=1e-4)


def test_heads_of_stage_1_start_alike_and_part(runs):
    start, head = load_reward_head(runs.path("li")), load_reward_head(runs.path("geli"))
    weights = [start.layers[0].weight, *(member.layers[0].weight for member in head.members)]
    assert all(0 < (a - b).norm() < 0.5 * a.norm() for a, b in pairwise(weights))


def test_a_reward_has_the_mean_and_the_spread_of_its_heads(runs):
    reward = GELIReward.load(runs.path("geli"), device="cpu")
    each = torch.stack([
        GELIReward(reward.encoder, member, context_turns=2).score(PROMPTS, RESPONSES) for member in reward.head.members
    ])  # fmt: skip
    torch.testing.assert_close(reward.score(PROMPTS, RESPONSES), each.mean(dim=0))
    torch.testing.assert_close(reward.spread(PROMPTS, RESPONSES), each.std(dim=0))
    assert each.std(dim=0).min() > 0
    lower = GELIReward.load(runs.path("geli"), device="cpu", ensemble="lower", spread_penalty=2.0)
    torch.testing.assert_close(lower.score(PROMPTS, RESPONSES), each.mean(dim=0) - 2 * each.std(dim=0))


def test_stage_3_chooses_how_an_ensemble_scores(runs):
    scored = {}
    for words in ("", "--ensemble lower", "--ensemble lower --spread_penalty 3", "--ensemble weights"):
        printed = runs.stage_3("--train", "--val", "--reward_path", "geli", "--exp_name", "policy", *words.split())
        assert f"{runs.path('geli')} (stage 2, RRD, LI from the face, overall_affect, 2 heads)" in printed.stdout
        record = json.loads((runs.folder / "rlmf_weights" / "policy_llama.json").read_text())
        scored[words] = record["metrics"]["before"]["reward"]
    assert len(set(scored.values())) == 4
    assert scored["--ensemble lower --spread_penalty 3"] < scored["--ensemble lower"] < scored[""]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--reward_path one --ensemble lower", "reward1_one is one head: train several with train_reward_GELI.py"),
        ("--reward_path three --ensemble weights", "reward1_three started from different weights"),
        ("--reward_path geli --spread_penalty 2", "--spread_penalty has no effect without --ensemble lower"),
        ("--reward random --ensemble lower", "--ensemble has no effect where no reward head is used"),
    ],
)
def test_stage_3_refuses_what_would_do_nothing(runs, words, message):
    error = runs.stage_3("--train", *words.split(), check=2).stderr
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--redist_type RUDDER --heads 2", "--heads: an ensemble cannot be of RUDDER's heads"),
        ("--unfreeze --heads 2", "--heads: an ensemble shares a frozen encoder: leave out --unfreeze"),
    ],
)
def test_stage_2_refuses_what_no_ensemble_can_be(words, message):
    assert message in call_script("train_reward_GELI.py", "--train", *words.split(), check=2).stderr


def test_a_decorrelated_head_is_recorded_with_its_correlations(runs, sample):
    runs.stage_2("decorrelated", "--decorrelate", 3)
    record, names = runs.record("decorrelated"), {f"correlation_with_{name}" for name in SURFACE}
    assert record["arguments"]["decorrelate"] == load_reward_head(runs.path("decorrelated")).config.decorrelate == 3
    assert (
        record["metrics"]["before_training"].keys() == names and "before_training" not in runs.record("one")["metrics"]
    )
    assert names < runs.record("one")["metrics"]["validation"].keys()
    validation = TurnSet.from_trajectories(split(read_corpus(sample, "overall_affect"), 6)[1], 2)
    lengths = [len(response.split()) for _, response in validation.texts]
    found = np.corrcoef(lengths, runs.rewards("decorrelated"))[0, 1]
    assert record["metrics"]["validation"]["correlation_with_words"] == pytest.approx(found, abs=1e-3)


@pytest.mark.parametrize("heads", [1, 2])
def test_training_with_the_penalty_removes_a_planted_length_bias(heads):
    """Features are a turn's quality and length, scores follow both; length and quality are independent."""
    rng = np.random.default_rng(0)
    quality, words = rng.normal(size=(40, 6)), rng.integers(1, 20, size=(40, 6))
    scores = 160 * (0.1 * quality + 0.03 * (words - 10)).mean(axis=1)
    turns = turn_set(*(trajectory(str(i), score, ["neutral"] * 6) for i, score in enumerate(scores)))
    turns = replace(turns, texts=[("", "AI: " + "word " * n) for n in words.ravel()])
    features = torch.tensor(np.stack([quality.ravel(), (words.ravel() - 10) / 5], axis=1), dtype=torch.float32)
    encoded = SimpleNamespace(
        prepare=lambda *_: None, encoder=torch.nn.Module(), idle_passes=lambda n: torch.zeros(()),
        training=lambda chosen, *_: features[chosen],
    )  # fmt: skip
    correlations = {}
    for weight in (0.0, 3.0):
        torch.manual_seed(0)
        config = RewardHeadConfig("small_model", 2, "x", False, 9, 1, 2, None, "RRD", li=False, members=heads)
        head = new_reward_head(config)
        options = GELITrainingOptions(batch_size=10, epochs=15, learning_rate=1e-2, decorrelate=weight)
        stage = GELITraining(head, encoded, turns, None, options, Accelerator(cpu=True), 0, lambda: None)
        logged = [stage.step(step) for step in range(1, stage.steps + 1)]
        assert ("train/decorrelation_loss" in logged[-1]) == bool(weight)
        correlations[weight] = np.corrcoef([head_rewards(head, features), quality.ravel(), words.ravel()])[0, 1:]
    assert correlations[0][1] > 0.5 and abs(correlations[3][1]) < 0.2
    assert correlations[3][0] > correlations[0][0] + 0.2
