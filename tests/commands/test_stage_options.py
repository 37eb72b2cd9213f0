"""Every option of the three commands, by what it does: each test fails if its option did nothing."""

import json
import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, call_script, small_model, with_sizes
from no_pictures import quick_commands
from options_table import options_page
from textblob import TextBlob
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from turn_sets import trajectory, turn_set

import train_reward_GELI
import train_reward_LI_only
import train_rl_GELI
from data_utils import DataOptions, make_trajectory, read_corpus, split, turn_text
from geli.data.candor import read_conversation
from geli.data.questions import QUESTIONS
from geli.data.shares import TrajectoryShares
from geli.heads import encoder_of_head, load_reward_head, save_reward_head
from geli.nets import encoder as encoder_module
from geli.nets import policy as policy_module
from geli.nets.encoder import TurnEncoder, load_encoder
from geli.nets.options import ENCODERS, POLICIES
from geli.nets.prompts import Prompt
from geli.reward import GELIReward
from geli.rl.reward_options import RF_MODELS
from geli.run.errors import UserError
from geli.run.options import RunOptions
from geli.run.training import train_steps
from models import HEADS, RewardHead, RewardHeadConfig
from tools.writer import write_conversation
from train_reward_GELI import Drawn, GELITraining, GELITrainingOptions, load_saved
from train_reward_LI_only import LITraining, LITrainingOptions

QUICK = ("--context_turns", 2, "--learning_rate", 1e-3, "--train_size", 6, "--small_model_shrink", "--model", "convo")
WITHOUT_HEAD = tuple(word for word in QUICK if word != "--small_model_shrink")  # RUDDER has its own


SHORT = dict(min_new_tokens=4, max_new_tokens=8)  # responses


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Without wandb and pictures, and with short responses."""
    with quick_commands(**SHORT):
        yield


@pytest.fixture(scope="module")
def stages(sample, tiny, tmp_path_factory):
    """Functions that run stage 1, stage 2 (from stage 1's run `li`) and stage 3 in one output folder."""
    out = tmp_path_factory.mktemp("out")
    data = ("--data_dir", sample, "--output_dir", out)
    encoder = ("--lang_model_path", tiny / "bart")

    class Stages:
        folder = out

        def li(self, *more, encoder=encoder, quick=QUICK, check=0):
            options = (*data, *encoder, *quick, "--epochs", 2, "--batch_size", 32, *more)
            return call_script("train_reward_LI_only.py", *options, check=check)

        def ge(self, *more, encoder=encoder, quick=QUICK, check=0):
            return call_script("train_reward_GELI.py", *data, *encoder, *quick, "--epochs", 2, *more, check=check)

        def evaluate(self, head, run, *more, check=0):
            options = ("--reward_path", head, "--train_size", 6, "--run_name", run)
            return call_script("train_reward_GELI.py", *data, "--val", *options, *more, check=check)

        def geli(self, *more, **options):
            return self.ge("--affect_path", "li", *more, encoder=(), **options)

        def ppo(self, *more, check=0):
            options = with_sizes(more, steps=1, batch_size=2, val_prompts=4)
            model = ("--model_name", tiny / "llama", "--context_turns", 2)
            return call_script("train_rl_GELI.py", *data, *model, *options, check=check)

        def config(self, run):
            return load_reward_head(self.path(run)).config

        def path(self, run):
            return next(out.glob(f"*/reward1_{run}"))

        def training_trajectories(self):
            return split(read_corpus(sample, "overall_affect"), 6)[0]

        def encoder_folder(self, run):
            return encoder_of_head(self.config(run), self.path(run))

        def record(self, run):
            return json.loads(next(out.glob(f"*/reward1_{run}.json")).read_text())

        def table(self, run):
            return pd.read_csv(next(out.glob(f"*/val_turn_rewards_{run}.csv")))

        def weights(self, run):
            return torch.cat([p.flatten() for p in load_reward_head(self.path(run)).parameters()])

    stages = Stages()
    stages.li("--run_name", "li", "--val")
    stages.geli("--train", "--val", "--run_name", "geli")
    stages.ge("--train", "--val", "--run_name", "ge")
    return stages


# ---------------------------------------------------------------------------------------------------------------------
# Heads and losses


@pytest.mark.parametrize("option", ["hard_shrink", "batch_norm", "small_model"])
def test_each_head_trains_in_both_stages(stages, option):
    quick = tuple(f"--{option}" if word == "--small_model_shrink" else word for word in QUICK)
    stages.li("--run_name", f"li-{option}", quick=quick)
    stages.ge("--train", "--affect_path", f"li-{option}", "--run_name", f"geli-{option}", encoder=(), quick=quick)
    for run in (f"li-{option}", f"geli-{option}"):
        assert stages.config(run).head == option
    folder = stages.path(f"li-{option}").parent.name
    assert ("shrink_True" in folder) == (option == "hard_shrink")


def test_a_head_of_another_kind_than_stage_1s_is_refused(stages):
    result = stages.geli("--train", quick=QUICK[:6], check=2)
    assert "its head is of the kind small_model_shrink, the options ask for default" in result.stderr


@pytest.mark.slow
def test_contrastive_changes_training(stages):
    stages.li("--run_name", "li-contra", "--contrastive")
    assert "contra_True" in stages.path("li-contra").parent.name
    assert not torch.equal(stages.weights("li-contra"), stages.weights("li"))
    stages.geli("--train", "--run_name", "plain")
    stages.geli("--train", "--run_name", "contra", "--contrastive")
    assert not torch.equal(stages.weights("plain"), stages.weights("contra"))


@pytest.mark.slow
def test_the_curriculum_shows_the_answer_to_training_turns_only(stages, sample, monkeypatch):
    seen = {True: 0, False: 0}
    tokenize = TurnEncoder.tokenize

    def count(self, pairs):
        for _, response in pairs:
            seen["User's rating: " in response] += 1
        return tokenize(self, pairs)

    monkeypatch.setattr(TurnEncoder, "tokenize", count)
    for run, options in {
        "curriculum": ("--curriculum",),
        "exposure": ("--curriculum_exposure",),
        "both": ("--curriculum", "--curriculum_exposure"),
    }.items():
        stages.geli("--train", "--val", "--run_name", run, *options)
    training, validation = (
        sum(len(t.agent_turns) for t in part) for part in split(read_corpus(sample, "overall_affect"), 6)
    )
    assert seen == {True: 3 * training, False: 3 * (training + validation)}  # validation never shows it
    assert len({tuple(stages.weights(run).tolist()) for run in ("geli", "curriculum", "exposure")}) == 3
    assert torch.equal(stages.weights("both"), stages.weights("exposure"))  # exposure says how often
    stages.li("--run_name", "li-told", "--curriculum")
    stages.li("--run_name", "li-exposed", "--curriculum_exposure")
    assert "curriculum_True_curriculum_exposureFalse" in stages.path("li-told").parent.name
    assert "curriculum_False_curriculum_exposureTrue" in stages.path("li-exposed").parent.name
    assert len({tuple(stages.weights(run).tolist()) for run in ("li", "li-told", "li-exposed")}) == 3


@pytest.mark.slow
def test_unfreeze_trains_saves_and_hands_on_the_encoder(stages):
    stages.geli("--train", "--val", "--run_name", "thawed", "--unfreeze", "--encoder_learning_rate", 1e-3)
    path = stages.path("thawed")
    name = stages.encoder_folder("thawed")
    assert name == str(path.parent / "lang_model_thawed")
    start = load_encoder(stages.encoder_folder("li"))
    moved = [
        not torch.equal(a, b)
        for a, b in zip(start.encoder.parameters(), load_encoder(name).encoder.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) / 2
    stages.geli("--train", "--run_name", "thawed-slowly", "--unfreeze")
    assert not torch.equal(stages.weights("thawed-slowly"), stages.weights("thawed"))  # its rate is an option
    stages.evaluate("thawed", "thawed-again")
    assert stages.record("thawed-again")["metrics"]["validation"] == stages.record("thawed")["metrics"]["validation"]
    run = stages.ppo("--val", "--train", "--reward_path", "thawed", "--exp_name", "thawed")
    assert f"Reward head: {path}" in run.stdout
    assert f"Reward head: {path}" not in stages.ppo("--val", "--train", "--reward_path", "geli").stdout


def test_unfreeze_names_stage_1s_folder_as_published(stages):
    stages.li("--run_name", "li-thawed", "--unfreeze")
    assert stages.path("li-thawed").parent.name == "reward_function_convo_160_scaled_overall_affect"
    stages.ge("--train", "--affect_path", "li-thawed", "--run_name", "after-thawed", encoder=())  # and stage 2 finds it
    assert stages.config("after-thawed").li


@pytest.mark.slow
def test_loss_scale_lambda_and_ep_len_change_what_is_learned(stages):
    runs = {
        "normalized": ("--loss_scale", "normalized"),
        "lambda0": ("--lambda", 0),
        "lambda1": ("--lambda", 1),
        "actual": ("--ep_len", "actual"),
    }
    for run, options in runs.items():
        stages.geli("--train", "--val", "--run_name", run, *options)
    found = {run: stages.record(run)["metrics"]["validation"] for run in (*runs, "geli")}
    assert len({metrics["ge_loss"] for metrics in found.values()}) == len(found)
    assert found["lambda0"]["li_loss"] < found["lambda1"]["li_loss"]
    assert found["actual"]["ge_loss"] > found["geli"]["ge_loss"]  # a return of seven turns of at most 1 is too small


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("redist_type", ["RRD", "IRCR", "LLM"])
def test_the_geli_loss_of_a_trajectory_by_hand(redist_type, normalized):
    """Turns of rewards 0.25 and 0.5, LI targets 1 and 0, R = 80, lambda 0.25; RRD and LLM draw both."""
    # of the training set, R is 80 and 40 and the LI targets are 1, 0, 0, 1, 0, 0
    turns = turn_set(
        trajectory("a", 80.0, ["happiness", "neutral"]),
        trajectory("b", 40.0, ["neutral", "happiness", "neutral", "anger"]),
    )
    shares = {"a/0": {"1": 60.0, "3": 20.0}, "b/0": dict.fromkeys("1357", 10.0)}
    turns = turns.with_shares({key: TrajectoryShares("", of) for key, of in shares.items()})
    scale = "normalized" if normalized else "raw"
    options = GELITrainingOptions(ge_weight=0.25, redist_type=redist_type, loss_scale=scale, ep_len=160, epochs=1)
    rewards = torch.tensor([[0.25], [0.5]])
    features = SimpleNamespace(
        prepare=lambda *_: None, training=lambda *_: rewards, encoder=torch.nn.Module(), held_out=None
    )
    head = torch.nn.Linear(1, 1)
    head.forward, head.config = lambda features, with_hidden: (features, features), SimpleNamespace(li=True)
    head.rewards, head.members = lambda outputs, n_turns: outputs, [head]
    stage = GELITraining(head, features, turns, None, options, Accelerator(cpu=True), 0, lambda: None)
    loss, _, ge, li, _ = stage.trajectory_loss(head, Drawn(0, np.arange(2), np.zeros(2, dtype=bool), 160.0))
    # LI: (0.75^2 + 0.5^2) / 2; the return is 160 * 0.375 = 60, so that L_GE is (80 - 60)^2
    assert (ge, li) == (pytest.approx(400), pytest.approx(0.40625))
    # RRD regresses to R; IRCR's loss is ((0.5 - 0.25)^2 + 0) / 2, of R/L = 0.5
    # of LLM: turns of 120/160 and 40/160 give ((0.25 - 0.75)^2 + (0.5 - 0.25)^2) / 2, and the sum (60 - 80)^2 / 160^2;
    # in the training set they are 0.75 and five times 0.25, of variance 14/96 - (1/3)^2
    decomposed, variance = {
        "RRD": (400, 400),
        "IRCR": (0.03125, 0.125**2),
        "LLM": (0.15625 + 0.015625, 5 / 144),
    }[redist_type]
    scales = (variance, 2 / 9) if normalized else (1, 1)
    assert loss.item() == pytest.approx(0.25 * decomposed / scales[0] + 0.75 * 0.40625 / scales[1])


@pytest.mark.slow
def test_bar_chart_logs_rewards_by_turn_without_text_or_ids(stages, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    stages.geli("--train", "--val", "--bar_chart", "--epochs", 1, "--run_name", "bars")
    tables = [json.loads(path.read_text()) for path in (stages.folder / "wandb").rglob("*.table.json")]
    assert len(tables) == 4  # the first four trajectories
    bars = [[row[1] for row in table["data"]] for table in tables]
    rewards = stages.table("bars").groupby(["conversation_id", "flip"], sort=False)["reward"]
    expected = [heights.tolist() for _, heights in rewards][:4]
    for found, heights in zip(sorted(bars), sorted(expected), strict=True):
        assert found == pytest.approx(heights, abs=1e-5)
    for table in tables:
        assert table["columns"] == ["turn", "predicted reward"]
        assert [row[0] for row in table["data"]] == [str(n + 1) for n in range(len(table["data"]))]


# ---------------------------------------------------------------------------------------------------------------------
# Decompositions and LI signals


@pytest.mark.parametrize("kind", ["IRCR", "RUDDER"])
def test_each_decomposition_alone_and_with_li(stages, kind):
    quick = WITHOUT_HEAD if kind == "RUDDER" else QUICK
    stages.ge("--train", "--val", "--redist_type", kind, "--run_name", f"ge-{kind}", quick=quick)
    stages.geli("--train", "--val", "--redist_type", kind, "--run_name", f"geli-{kind}", quick=quick)
    for run, li in ((f"ge-{kind}", False), (f"geli-{kind}", True)):
        config = stages.config(run)
        assert (config.redist_type, config.li) == (kind, li)
        prefix = "visual_feedback_baselines" if li else "baselines"
        assert stages.path(run).parent.name == f"{prefix}_convo_overall_affect_baseline_{kind}_K_160"
        stages.evaluate(run, f"{run}-again")
        assert stages.record(f"{run}-again")["metrics"] == {"validation": stages.record(run)["metrics"]["validation"]}
    assert not torch.equal(stages.weights(f"ge-{kind}"), stages.weights(f"geli-{kind}"))


def test_ircr_learns_each_turns_even_share_of_the_score(stages):
    options = ("--redist_type", "IRCR", "--learning_rate", 5e-3, "--epochs", 25, "--run_name", "even")
    stages.ge("--train", *options)  # with --val the best epoch is kept, and an early one may hit the mean by chance
    stages.evaluate("even", "even-again")
    scores = [t.score for t in stages.training_trajectories()]
    assert stages.table("even-again")["reward"].mean() == pytest.approx(np.mean(scores) / 160, rel=0.05)


def test_rudders_l_ge_compares_the_mean_reward_times_l_with_the_score(stages, sample):
    stages.ge("--train", "--val", "--redist_type", "RUDDER", "--run_name", "rudder", quick=WITHOUT_HEAD)
    table = stages.table("rudder")
    scores = {
        (t.conversation.id, t.user): t.score
        for part in read_corpus(sample, "overall_affect").trajectories.values()
        for t in part
    }
    trajectories = table.groupby(["conversation_id", "user_id"])["reward"]
    errors = [(scores[key] - 160 * rewards.mean()) ** 2 for key, rewards in trajectories]
    assert stages.record("rudder")["metrics"]["validation"]["ge_loss"] == pytest.approx(np.mean(errors), rel=1e-3)


def test_k_is_how_many_turns_rrd_draws(stages):
    stages.ge("--train", "--K", 2, "--run_name", "k2")
    stages.ge("--train", "--K", 99, "--run_name", "k99")
    assert not torch.equal(stages.weights("k2"), stages.weights("ge"))
    assert torch.equal(stages.weights("k99"), stages.weights("ge"))  # 160 and 99 are both more than there are


@pytest.mark.slow
def test_sentiment_targets_are_those_of_the_users_next_turn(stages, sample):
    stages.li("--run_name", "said", "--val", "--li_signal", "sentiment", "--negative_affect", "negative")
    table = stages.table("said")
    for conversation, rows in table.groupby("conversation_id"):
        transcript = pd.read_csv(
            sample / conversation / "transcription" / "transcript_cliffhanger.csv", dtype={"turn_id": str}
        )
        for row in rows.itertuples():
            later = transcript[(transcript["start"] > row.start) & (transcript["speaker"] == row.user_id)]
            polarity = TextBlob(later["utterance"].iloc[0]).sentiment.polarity if len(later) else 0.0
            assert row.target == (polarity > 0.05) - (polarity < -0.05)
    assert set(table["target"]) == {-1, 0, 1}
    assert stages.config("said").li_signal == "sentiment"
    stages.ge("--train", "--affect_path", "said", "--run_name", "geli-said", encoder=())
    assert stages.config("geli-said").li_signal == "sentiment"  # stage 2 follows its stage-1 run


@pytest.mark.slow
def test_sentiment_can_come_from_a_classifier(stages, sample, tiny, tmp_path):
    labels = {0: "NEGATIVE", 1: "neutral", 2: "POSITIVE"}
    for name, id2label in (("good", labels), ("stars", {0: "1 star", 1: "2 stars", 2: "3 stars"})):
        torch.manual_seed(0)
        classifier = AutoModelForSequenceClassification.from_pretrained(tiny / "bart", id2label=id2label)
        with torch.no_grad():
            classifier.classification_head.out_proj.bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
        classifier.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tiny / "bart").save_pretrained(tmp_path / name)
    sentiment = ("--li_signal", "sentiment", "--sentiment_model")
    stages.li("--run_name", "classified", "--val", *sentiment, tmp_path / "good")
    table = stages.table("classified")
    last = table.groupby(["conversation_id", "flip"])["start"].transform("max") == table["start"]
    assert (table["target"][~last] == 1).all()  # this one finds everything positive
    assert set(table["target"][last]) == {0, 1}  # but where nobody answered it finds nothing
    stages.ge("--train", "--val", "--affect_path", "classified", "--run_name", "geli-classified", encoder=())
    assert stages.config("geli-classified").sentiment_model == str(tmp_path / "good")
    again = stages.table("geli-classified")
    assert (again["target"] == table["target"]).all()  # stage 2 asks the same classifier
    assert "and this run learns from the face" in stages.geli("--train", *sentiment[2:], "x", check=2).stderr
    refused = stages.li(*sentiment, tmp_path / "stars", check=2).stderr
    assert "expected labels that begin with pos and neg, found 1 star" in refused
    assert "is not used by --li_signal face" in stages.li("--li_signal", "face", *sentiment[2:], "x", check=2).stderr


def test_reaction_type_and_negative_affect_change_the_targets(stages, sample, tmp_path):
    data = tmp_path / "candor"  # in the sample a face stays through a turn: here every third frame is neutral
    shutil.copytree(sample, data)
    for path in data.glob("*/audio_video_features.csv"):
        table = pd.read_csv(path)
        table.loc[::3, [name for name in table if name.startswith("prob_face_")]] = 0.0
        table.loc[::3, "prob_face_neutral"] = 1.0
        table.to_csv(path, index=False)
    targets = {}
    for run, options in {
        "class": (),
        "mean": ("--reaction_type", "mean"),
        "negative": ("--negative_affect", "negative"),
    }.items():
        stages.li("--run_name", f"target-{run}", "--val", "--epochs", 1, "--data_dir", data, *options)
        targets[run] = set(stages.table(f"target-{run}")["target"])
    assert targets["class"] == {0, 1} and targets["negative"] == {-1, 0, 1}
    assert len(targets["mean"]) > 2 and all(0 <= value <= 1 for value in targets["mean"])


@pytest.mark.parametrize("transcript", ["audiophile", "backbiter"])
def test_each_transcript_is_the_one_that_is_read(stages, sample, tmp_path, transcript):
    shutil.copytree(sample, tmp_path / "candor")
    for path in (tmp_path / "candor").glob("*/transcription/transcript_cliffhanger.csv"):
        path.rename(path.with_name(f"transcript_{transcript}.csv"))
    data = ("--data_dir", tmp_path / "candor", "--epochs", 1)
    message = stages.li(*data, check=2).stderr
    assert "transcript_cliffhanger.csv: no such file (40)" in message
    stages.li(*data, "--transcript", transcript, "--run_name", f"li-{transcript}")
    assert stages.record(f"li-{transcript}")["data"]["conversations"] == 40


# ---------------------------------------------------------------------------------------------------------------------
# Encoders


def test_max_length_cuts_what_the_encoder_sees_and_is_remembered(stages):
    stages.li("--run_name", "short", "--max_length", 24)
    assert stages.config("short").max_length == 24
    assert not torch.equal(stages.weights("short"), stages.weights("li"))
    assert "at least 5 tokens are needed" in stages.li("--max_length", 4, check=2).stderr


def test_val_all_validates_on_every_conversation_that_is_not_trained_on(stages):
    stages.evaluate("geli", "all", "--val_all")
    assert len(stages.record("all")["validation_conversations"]) == 34
    stages.evaluate("geli", "all2", "--val_all", "--train_size", 2)
    seen = set(stages.record("geli")["training_conversations"])  # six, whatever this run's own training size
    assert not seen & set(stages.record("all2")["validation_conversations"])
    assert len(stages.record("geli")["validation_conversations"]) == 4


def test_dtype_and_device_are_those_that_are_asked_for(stages):
    for dtype in ("float32", "bfloat16"):
        stages.li("--run_name", dtype, "--dtype", dtype, "--device", "cpu", "--train_size", 2, "--epochs", 1)
    assert not torch.equal(stages.weights("float32"), stages.weights("bfloat16"))
    if not torch.cuda.is_available():
        assert "--device cuda: this machine has none" in stages.li("--device", "cuda", check=2).stderr


def test_llama2_is_adapted_not_rewritten(stages, sample, tmp_path):
    folder = small_model("llama-encoder", tmp_path / "llama", sample)
    options = ("--model", "LLAMA2", "--lang_model_path", folder)
    stages.li("--run_name", "lora", "--val", encoder=options, quick=QUICK[:-2])
    saved = stages.path("lora").with_name("lang_model_lora")
    assert (saved / "adapter_model.safetensors").is_file() and not (saved / "model.safetensors").exists()
    stages.ge("--train", "--val", "--affect_path", "lora", "--run_name", "geli-lora", encoder=())
    table = stages.table("geli-lora")
    errors = (table["reward"] - table["target"]) ** 2
    li_loss = errors.groupby([table["conversation_id"], table["flip"]]).mean().mean()
    assert stages.record("geli-lora")["metrics"]["validation"]["li_loss"] == pytest.approx(li_loss, rel=1e-3)
    stages.ge("--train", "--affect_path", "lora", "--unfreeze", "--run_name", "lora-thawed", encoder=())
    assert stages.path("lora-thawed").with_name("lang_model_lora-thawed").joinpath("adapter_config.json").is_file()


def test_frozen_layers_stay_as_they_were(stages, tiny):
    def moved(folder, start):
        pairs = zip(
            load_encoder(start).encoder.named_parameters(), load_encoder(folder).encoder.parameters(), strict=True
        )
        return {name for (name, a), b in pairs if not torch.equal(a, b)}

    stages.li("--run_name", "li-top", "--freeze_layers", 1)
    above = {name for name, _ in load_encoder(str(tiny / "bart")).encoder.named_parameters() if "layers.1." in name}
    assert moved(stages.encoder_folder("li-top"), str(tiny / "bart")) == above
    stages.ge("--train", "--unfreeze", "--encoder_learning_rate", 1e-3, "--freeze_layers", 1, "--run_name", "ge-top")
    assert moved(stages.encoder_folder("ge-top"), str(tiny / "bart")) == above


@pytest.mark.parametrize("patience", [None, 1, 2])
def test_patience_ends_training_that_no_longer_gets_better(stages, monkeypatch, patience):
    losses = iter([0.5, 0.3, 0.4, 0.2, 0.6, 0.7, 0.8, 0.9])  # of one validation after another

    def measure(*_):
        return {"li_loss": (loss := next(losses)), "ge_loss": loss}, None, None

    turns = turn_set(*(trajectory(name, 50.0, ["happiness", "neutral"]) for name in "abcd"))
    encoder = SimpleNamespace(
        tokenize=lambda texts: [SimpleNamespace(ids=text[1]) for text in texts], trainable=list, train=lambda *_: None,
        remember=lambda *_: None, encode_with_gradients=lambda pairs, *_: torch.zeros(len(pairs), 4),
    )  # fmt: skip
    features = SimpleNamespace(
        prepare=lambda *_: None, training=lambda turns, *_: torch.zeros(len(turns), 4), encoder=encoder,
        held_out=lambda _: None, idle_passes=lambda _: torch.zeros(()),
    )  # fmt: skip
    head = RewardHead(RewardHeadConfig("small_model_shrink", 4, "x", False, 9, 2, 1, "overall_affect"))
    accelerator, saved = Accelerator(cpu=True), []
    monkeypatch.setattr(train_reward_LI_only, "measure", measure)
    monkeypatch.setattr(train_reward_GELI, "measure", measure)
    monkeypatch.setattr(train_reward_GELI, "wandb_validation", lambda _: {})
    monkeypatch.setattr(train_reward_LI_only, "wandb_validation", lambda _: {})
    monkeypatch.setattr(train_reward_LI_only, "encode_together", lambda *_: None)
    options = LITrainingOptions(epochs=8, batch_size=4, patience=patience)
    stage = LITraining(encoder, head, turns, turns, options, accelerator, 0, lambda: saved.append(1))
    train_steps(stage, stage.steps, "")
    ends = {None: 16, 1: 6, 2: 12}[patience]  # two steps an epoch; without patience the end alone is validated
    assert stage.steps == 16 and stage.best["steps"] == ends
    assert stage.best["best_step"] == {None: 16, 1: 4, 2: 8}[patience]
    losses = iter([0.5, 0.3, 0.4, 0.2, 0.6, 0.7, 0.8, 0.9])
    options = GELITrainingOptions(epochs=8, batch_size=4, patience=patience)
    stage = GELITraining(head, features, turns, turns, options, accelerator, 0, lambda: saved.append(2))
    train_steps(stage, stage.steps, "")
    assert stage.best["steps"] == {None: 8, 1: 3, 2: 6}[patience] and stage.best["best_epoch"] == (
        2 if patience == 1 else 4
    )


@pytest.mark.parametrize("kind", ["longformer", "longt5"])
def test_other_encoders_train_and_freeze(stages, sample, tmp_path, kind):
    alias = {"longformer": "longformer", "longt5": "longT5"}[kind]
    folder = small_model(kind, tmp_path / kind, sample)
    options = ("--model", alias, "--lang_model_path", folder)
    stages.li("--run_name", f"li-{kind}", "--epochs", 1, encoder=options, quick=QUICK[:-2])
    assert stages.path(f"li-{kind}").parent.name.startswith(f"SINGLE_INDEX_reward_function_{alias}_")
    stages.ge(
        "--train", "--affect_path", f"li-{kind}", "--run_name", f"geli-{kind}", encoder=options[:2], quick=QUICK[:-2]
    )
    assert stages.path(f"geli-{kind}").parent.name.startswith(f"visual_feedback_baselines_{alias}_")


# ---------------------------------------------------------------------------------------------------------------------
# Corpora without faces


def test_stages_that_need_no_faces_run_without_them(stages, sample, tmp_path):
    shutil.copytree(sample, tmp_path / "candor")
    for path in (tmp_path / "candor").glob("*/audio_video_features.csv"):
        path.unlink()
    data = ("--data_dir", tmp_path / "candor")
    stages.ge(*data, "--train", "--val", "--bar_chart", "--run_name", "faceless")
    measured = stages.record("faceless")["metrics"]["validation"]
    assert measured["ge_loss"] > 0 and [measured[x] for x in ("li_loss", "roc_auc_happy", "delta_li")] == [None] * 3
    assert stages.table("faceless")[["affect", "target"]].isna().all(axis=None)
    stages.li(*data, "--val", "--li_signal", "sentiment", "--run_name", "faceless-words")
    stages.ge(*data, "--train", "--val", "--affect_path", "faceless-words", "--run_name", "faceless-geli", encoder=())
    for run in ("faceless-words", "faceless-geli"):
        assert stages.record(run)["metrics"]["validation"]["li_loss"] >= 0
        assert stages.record(run)["data"]["conversations_without_faces"] == 40
    stages.evaluate("geli", "faceless-again", *data)
    again, before = (stages.record(run)["metrics"]["validation"] for run in ("faceless-again", "geli"))
    assert again["ge_loss"] == before["ge_loss"] and again["li_loss"] is None
    for message in (stages.li(*data, check=2).stderr, stages.geli(*data, "--train", check=2).stderr):
        assert "no faces to learn from (audio_video_features.csv: no such file) (80)" in message


# ---------------------------------------------------------------------------------------------------------------------
# Reward classes


def test_every_reward_class_has_its_scale(tmp_path):
    """Answers of 1 to 10 are scaled to points, and two questions are answered in points."""
    answers = {name: 60 + i if row.points == 1 else 1 + i % 7 for i, (name, row) in enumerate(QUESTIONS.items())}
    turns = [("u", 0, 3, "hello there my good old friend"), ("v", 3, 6, "hi")]
    write_conversation(tmp_path / "c", turns, [], {"u": answers, "v": answers})
    conversation = read_conversation(tmp_path / "c")
    assert len(QUESTIONS) == 17
    for name, answer in answers.items():
        expected = answer if name in ("conversationalist", "good_for_advice") else 10 * answer
        assert make_trajectory(conversation, False, name).score == expected


def test_a_class_that_the_survey_lacks_is_an_error_that_lists_those_present(stages, sample, tmp_path):
    for folder in sorted(path for path in sample.iterdir() if path.is_dir())[:3]:
        shutil.copytree(folder, tmp_path / folder.name)
        survey = pd.read_csv(tmp_path / folder.name / "survey.csv")
        survey[["user_id", "overall_affect", "i_like_you"]].to_csv(tmp_path / folder.name / "survey.csv", index=False)
    message = stages.li("--reward_class", "you_are_warm", "--data_dir", tmp_path, check=2).stderr
    assert "has it; present: i_like_you, overall_affect" in message


def test_a_saved_head_is_not_measured_against_another_question(stages):
    result = stages.evaluate("geli", "other", "--reward_class", "i_like_you", check=2)
    assert "was trained for overall_affect, not i_like_you: give --reward_class overall_affect" in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Stage 3


def test_every_choice_of_reward_takes_the_newest_head_of_its_kind(tmp_path, capsys):
    stage_1 = RewardHeadConfig("small_model_shrink", 4, "x", False, 9, 2, 1, "overall_affect")
    stage_2 = replace(stage_1, stage=2, redist_type="RRD")
    of = {name: replace(stage_2, reward_class=kind.reward_class) for name, kind in RF_MODELS.items()}
    heads = {
        "sentiment": ("SINGLE_INDEX_reward_function_a", replace(stage_1, li_signal="sentiment"), "sentiment"),
        "LI": ("SINGLE_INDEX_reward_function_b", stage_1, "face"),
        "GE": ("baselines_convo_overall_affect_baseline_RRD_K_160", replace(stage_2, li=False), None),
        "VFRRD_funny": ("visual_feedback_baselines_convo_you_are_funny_baseline_RRD_K_160", of["VFRRD_funny"], "face"),
        "VFRRD_intelligent": (
            "visual_feedback_baselines_x_you_are_intelligent_baseline_RRD_K_160",
            of["VFRRD_intelligent"],
            "face",
        ),
        "VFRRD_humble": (
            "visual_feedback_baselines_convo_you_are_humble_baseline_RRD_K_160",
            of["VFRRD_humble"],
            "face",
        ),
        "VFRRD_sync": (
            "visual_feedback_baselines_x_our_thoughts_synced_up_sr1_baseline_RRD_K_1",
            of["VFRRD_sync"],
            "face",
        ),
        "GELI": ("visual_feedback_baselines_convo_overall_affect_baseline_RRD_K_160", stage_2, "face"),
    }
    assert set(heads) == set(RF_MODELS)

    def find(choice, name=None):
        options = train_rl_GELI.Options()
        reward = replace(options.reward, rf_model=choice, reward_path=name)
        run = replace(options.run, output_dir=str(tmp_path))
        return train_rl_GELI.find_reward(replace(options, reward=reward, run=run), None)

    for choice in heads:
        with pytest.raises(UserError, match=f"--rf_model {choice}: expected a reward head .* train one with train_"):
            find(choice)
    for number, (choice, (folder, config, learned)) in enumerate(heads.items()):
        path = tmp_path / folder / f"reward1_run{number}"
        path.parent.mkdir()
        save_reward_head(RewardHead(config), path)
        path.with_name(f"{path.name}.json").touch()  # its run has finished
        os.utime(path, (number, number))
        assert find(choice) == path
        said = f"(stage {config.stage}, {config.redist_type or 'no decomposition'}, "
        said += f"{f'LI from the {learned}' if learned else 'no LI'}, {config.reward_class})"
        assert f"Reward head: {path} {said}" in capsys.readouterr().out
    assert find("base") == find("GELI")  # the reference policy is measured with GELI's reward
    assert find("GELI", "run1") == tmp_path / heads["LI"][0] / "reward1_run1"


def test_the_head_of_a_run_that_was_killed_is_not_taken(tmp_path, capsys):
    """Its newest head is there, its record is not; a published head has no record, and counts."""
    folder = tmp_path / "visual_feedback_baselines_convo_overall_affect_baseline_RRD_K_160"
    folder.mkdir()
    config = RewardHeadConfig("small_model_shrink", 4, "x", False, 9, 2, 2, "overall_affect", redist_type="RRD")
    for number, run in enumerate(["old", "done", "killed", "killed-too"]):
        save_reward_head(RewardHead(config), folder / f"reward1_{run}")
        os.utime(folder / f"reward1_{run}", (number, number))

    def find(**reward):
        options = train_rl_GELI.Options()
        options = replace(options, run=replace(options.run, output_dir=str(tmp_path)))
        return train_rl_GELI.find_reward(replace(options, reward=replace(options.reward, **reward)), None).name

    refused = "found .*reward1_killed-too, whose run has not finished: .* --resume, or .* --reward_path"
    with pytest.raises(UserError, match=refused):
        find()
    assert find(reward_path="killed") == "reward1_killed"  # it was asked for
    for run in ("old", "done"):
        (folder / f"reward1_{run}.json").touch()
    capsys.readouterr()
    assert find() == "reward1_done"
    passed_over = re.findall(r"passed over .*/reward1_(\S+), whose run has not finished", capsys.readouterr().out)
    assert passed_over == ["killed-too", "killed"]
    (folder / "reward1_published").write_bytes(b"PK\x03\x04")  # the beginning of such a file
    assert train_rl_GELI.newest_head("GELI", str(tmp_path), DataOptions()).name == "reward1_published"


def test_the_head_of_another_corpus_or_question_is_not_taken(tmp_path, capsys):
    """Newest first: of another corpus, of another question, and one that fits; --reward_path takes what it names."""
    folder, (mine, other) = tmp_path / "visual_feedback_baselines_x", (tmp_path / "mine", tmp_path / "other")
    for path in (folder, mine / "a", other / "b", tmp_path / "third" / "c"):
        path.mkdir(parents=True)
    config = RewardHeadConfig("small_model_shrink", 4, "x", False, 9, 2, 2, "overall_affect", redist_type="RRD")
    heads = [
        ("fits", config, "a"),
        ("question", replace(config, reward_class="i_like_you"), "a"),
        ("corpus", config, "b"),
    ]
    for number, (run, of, conversation) in enumerate(heads):
        save_reward_head(RewardHead(of), folder / f"reward1_{run}")
        os.utime(folder / f"reward1_{run}", (number, number))
        (folder / f"reward1_{run}.json").write_text(json.dumps({"training_conversations": [conversation, "gone"]}))

    def find(data, **reward):
        options = train_rl_GELI.Options()
        options = replace(options, run=replace(options.run, output_dir=str(tmp_path)), data=data)
        return train_rl_GELI.find_reward(replace(options, reward=replace(options.reward, **reward)), None).name

    assert find(DataOptions(data_dir=str(mine))) == "reward1_fits"
    printed = capsys.readouterr().out
    assert (
        "/reward1_corpus, which was trained on another corpus than --data_dir" in printed and "Warning" not in printed
    )
    assert "/reward1_question, which was trained for i_like_you, not for --reward_class overall_affect" in printed
    assert find(DataOptions(data_dir=str(other))) == "reward1_corpus"
    assert find(DataOptions(data_dir=str(mine), reward_class="i_like_you")) == "reward1_question"
    with pytest.raises(
        UserError, match=r"found .*reward1_corpus, which was trained on another corpus than .*--reward_path"
    ):
        find(DataOptions(data_dir=str(tmp_path / "third")))
    capsys.readouterr()
    assert find(DataOptions(data_dir=str(mine)), reward_path="corpus") == "reward1_corpus"
    warning = "reward1_corpus was trained on another corpus than --data_dir"
    assert warning in capsys.readouterr().out

    run, training = RunOptions(output_dir=str(tmp_path)), GELITrainingOptions(reward_path="corpus")
    with pytest.raises(UserError, match="names the model x"):  # which is not on this machine
        load_saved(train_reward_GELI.Options(data=DataOptions(data_dir=str(mine)), run=run, training=training))
    assert warning in capsys.readouterr().out


def test_rudder_scores_a_response_given_the_agent_turns_before_it(stages, sample):
    stages.ge("--train", "--redist_type", "RUDDER", "--run_name", "rudder-rl", quick=WITHOUT_HEAD)
    path = stages.path("rudder-rl")
    head = load_reward_head(path)
    encoder = load_encoder(encoder_of_head(head.config, path)).eval()
    trajectory = next(iter(read_corpus(sample, "overall_affect").trajectories.values()))[0]
    turns = tuple(turn_text(trajectory.conversation, i, trajectory.user, 2) for i in trajectory.agent_turns)
    prompts = [Prompt("", context, response[4:], turns, t) for t, (context, response) in enumerate(turns)]
    score = GELIReward(encoder, head).score
    outputs = head(encoder.encode(encoder.tokenize(turns))).squeeze(1)  # one trajectory, turn after turn
    whole = head.rewards(outputs, len(turns))
    for order in (list(range(len(turns))), list(range(len(turns)))[::-1]):
        asked = [prompts[i] for i in order]
        found = score(asked, [prompt.human for prompt in asked])
        torch.testing.assert_close(found, whole[order], atol=1e-4, rtol=1e-4)
    other = score([prompts[5], prompts[5]._replace(trajectory=turns[::-1])], ["hello there"] * 2)
    assert other[0] != other[1]  # the turns before it count
    stages.ppo("--train", "--val", "--reward_path", "rudder-rl", "--exp_name", "rudder", "--allow_constant_reward")


def test_ppo_off_changes_nothing_and_saves_no_adapter(stages):
    stages.ppo("--train", "--val", "--ppo_off", "--exp_name", "off", "--steps", 2)
    weights = stages.folder / "rlmf_weights"
    assert not [path for path in weights.glob("off_*") if path.is_dir()]
    steps = pd.read_csv(weights / "off_llama_ppo_off_steps.csv")
    assert len(steps) == 2 and steps["kl"].abs().max() < 1e-4 and "policy_loss" not in steps
    metrics = json.loads((weights / "off_llama_ppo_off.json").read_text())["metrics"]
    assert set(metrics) == {"before", "human"}


def test_generate_writes_both_policies_answers_side_by_side(stages):
    stages.ppo("--train", "--exp_name", "both", "--learning_rate", 1e-2, "--steps", 3)
    stages.ppo("--generate", "--exp_name", "both")  # the newest checkpoint; no reward is needed
    path = stages.folder / "rlmf_weights" / "both_llama_3_val_responses.csv"
    table = pd.read_csv(path, keep_default_na=False)
    assert list(table) == ["prompt", "human", "base", "tuned"] and len(table) == 4
    assert (table["base"] != table["tuned"]).any()
    assert path.stat().st_mode & 0o077 == 0
    assert not (stages.folder / "rlmf_weights" / "both_llama_responses.csv").exists()


@pytest.mark.parametrize("algo", ["rloo", "grpo"])
def test_trls_algorithms_train_with_the_same_prompts_reward_and_folders(stages, algo):
    pytest.importorskip("trl")
    options = ("--algo", algo, "--batch_size", 4, "--num_generations", 2, "--trl", "beta=0.1")
    stages.ppo("--train", "--val", "--exp_name", algo, "--steps", 2, "--learning_rate", 1e-2, *options)
    weights = stages.folder / "rlmf_weights"
    assert pd.read_csv(weights / f"{algo}_llama_steps.csv")["step"].tolist() == [1, 2]
    metrics = json.loads((weights / f"{algo}_llama.json").read_text())["metrics"]
    assert abs(metrics["after"]["kl"]) > 1e-4 and abs(metrics["before"]["kl"]) < 1e-4
    stages.ppo("--val", "--exp_name", algo)  # its checkpoint is one like any other
    wrong = stages.ppo("--train", *options[:-1], "no_such_option=1", check=2).stderr
    assert "does not take this" in wrong and wrong.count("\n") == 1
    assert "expected a multiple" in stages.ppo("--train", *options[:2], "--batch_size", 5, check=2).stderr


def test_base_is_the_reference_policy_and_is_not_trained(stages):
    printed = stages.ppo("--rf_model", "base", "--train", "--val", "--generate", "--exp_name", "b").stdout
    assert "nothing is trained" in printed and "Reward head: " in printed
    weights = stages.folder / "rlmf_weights"
    ends = (".json", "_responses.csv", "_report.html", "_before_after.png")
    assert {path.name for path in weights.glob("b_*")} == {f"b_llama_base{end}" for end in ends}
    assert set(json.loads((weights / "b_llama_base.json").read_text())["metrics"]) == {"before", "human"}
    assert "give --val or --generate" in stages.ppo("--rf_model", "base", "--train", check=2).stderr


def test_no_accel_has_the_larger_adapter(stages):
    for options, rank, alpha in (((), 16, 32), (("--no_accel", "--peft"), 24, 48)):
        stages.ppo("--train", "--exp_name", f"rank{rank}", *options)
        config = stages.folder / "rlmf_weights" / f"rank{rank}_llama_1" / "adapter_config.json"
        found = json.loads(config.read_text())
        assert (found["r"], found["lora_alpha"], found["lora_dropout"]) == (rank, alpha, 0.05)


@pytest.mark.parametrize("kind", ["gpt2", "t5", "blenderbot"])
def test_other_policies_train_from_the_command_line(stages, sample, tmp_path, kind):
    folder = small_model(kind, tmp_path / kind, sample)
    stages.ppo("--model_name", folder, "--train", "--val", "--exp_name", "x", "--steps", 2)
    steps = pd.read_csv(stages.folder / "rlmf_weights" / f"x_{kind}_steps.csv")
    assert abs(steps["kl"][0]) < 1e-4 and steps["kl"][1] != 0
    stages.ppo("--model_name", folder, "--val", "--exp_name", "x")  # and its adapter is found and fits


def test_aliases_stand_for_the_published_models(monkeypatch, sample, tmp_path):
    assert {name: alias.hub_id for name, alias in ENCODERS.items()} == {
        "convo": "kabita-choudhary/finetuned-bart-for-conversation-summary",
        "longformer": "allenai/longformer-base-4096",
        "longT5": "Stancld/longt5-tglobal-large-16384-pubmed-3k_steps",
        "LLAMA2": "meta-llama/Llama-2-7b-chat-hf",
    }
    asked = []

    def load(auto_class, name, option, *_, **__):
        asked.append(name)
        raise KeyboardInterrupt  # far enough

    for module in (encoder_module, policy_module):
        monkeypatch.setattr(module, "load_pretrained", load)
    monkeypatch.chdir(tmp_path)
    data = ("--data_dir", sample, "--output_dir", tmp_path)
    for alias in ENCODERS:
        call_script("train_reward_LI_only.py", "--model", alias, *data, check=130)
    assert asked == [alias.hub_id for alias in ENCODERS.values()]
    asked.clear()
    names = {
        "llama2": "meta-llama/Llama-2-7b-chat-hf",
        "llama": "huggyllama/llama-7b",
        "cosmo": "allenai/cosmo-xl",
        "blenderbot-1b": "facebook/blenderbot-1B-distill",
        "blenderbot-400m": "facebook/blenderbot-400M-distill",
        "dialogpt": "microsoft/DialoGPT-large",
    }
    assert names == {alias: hub_id for alias, hub_id in POLICIES.items() if hub_id}  # without SmolLM2
    for alias in names:
        call_script("train_rl_GELI.py", "--model_name", alias, "--rf_model", "base", "--generate", *data, check=130)
    (tmp_path / "llama_hf").mkdir()
    call_script("train_rl_GELI.py", "--model_name", "llama", "--rf_model", "base", "--generate", *data, check=130)
    assert asked == [*names.values(), "./llama_hf"]


# ---------------------------------------------------------------------------------------------------------------------
# Options that would do nothing


LI_STAGE, STAGE_2 = "train_reward_LI_only.py", "train_reward_GELI.py"


@pytest.mark.parametrize(
    ("script", "given", "message"),
    [
        (LI_STAGE, "--val_all --bar_chart --log_text", "--log_text: nothing is validated: give --val"),
        (LI_STAGE, "--K 32", "--K: nothing is validated: give --val"),
        (LI_STAGE, "--patience 2", "--patience: nothing is validated: give --val"),
        (STAGE_2, "--train --freeze_layers 1", "--freeze_layers: the encoder is not trained: give --unfreeze"),
        (STAGE_2, "--val --reward_path x --patience 1", "--patience: nothing is trained: give --train"),
        (LI_STAGE, "--contrastive --epochs 1", "--contrastive: changes every second epoch, and there is one"),
        (LI_STAGE, "--sentiment_model x", "--sentiment_model: is not used by --li_signal face"),
        (STAGE_2, "--train --val_all", "--val_all: nothing is validated: give --val"),
        (STAGE_2, "--train --bar_chart", "--bar_chart: nothing is validated: give --val"),
        (STAGE_2, "--train --log_text", "--log_text: nothing is validated: give --val"),
        (STAGE_2, "--train --contrastive", "--contrastive: only LI uses it: give --affect_path"),
        (STAGE_2, "--train --lambda 0.5", "--lambda: only LI uses it: give --affect_path"),
        (STAGE_2, "--train --loss_scale raw", "--loss_scale: only LI uses it: give --affect_path"),
        (STAGE_2, "--train --li_signal face", "--li_signal: only LI uses it: give --affect_path"),
        (STAGE_2, "--train --reaction_type class", "--reaction_type: only LI uses it: give --affect_path"),
        (STAGE_2, "--train --negative_affect zero", "--negative_affect: only LI uses it: give --affect_path"),
        (STAGE_2, "--train --sentiment_model x", "--sentiment_model: only LI uses it: give --affect_path"),
        (STAGE_2, "--train --affect_path x --contrastive --epochs 1", "--contrastive: changes every second epoch"),
        (STAGE_2, "--train --encoder_learning_rate 5e-6", "--encoder_learning_rate: the encoder is not trained: give"),
        (STAGE_2, "--train --redist_type RUDDER --batch_norm", "--batch_norm: RUDDER has a network of its own"),
        (STAGE_2, "--train --llm_shares x", "--llm_shares: is for --redist_type LLM"),
        (STAGE_2, "--train --redist_type LLM", "give --llm_shares"),
        (STAGE_2, "--train --affect_path x --reward_path y", "--reward_path: is a head to evaluate, without --train"),
        (
            STAGE_2,
            "--val --reward_path x --K 9 --epochs 4 --save_steps 1 --resume",
            "--resume, --save_steps: nothing is trained: give",
        ),
        (
            STAGE_2,
            "--val --reward_path x --small_model --affect_path y",
            "--small_model, --affect_path: nothing is trained: give",
        ),
        (STAGE_2, "--val --reward_path x --max_length 9", "--max_length: the head of --reward_path brings its own"),
        (STAGE_2, "--val --reward_path x --model convo --context_turns 2", "the head of --reward_path brings its own"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(script, given, message):
    error = call_script(script, *given.split(), check=2).stderr
    assert message in error and error.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# All of them


def test_every_option_is_named_by_a_test():
    """An option that no test names is an option that no test would miss."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    parametrized = {f"--{name}" for name, head in HEADS.items() if head.selectable}  # built from a list of names
    options = re.findall(r"^\| `(--\w+)`", options_page(), re.MULTILINE)
    assert len(options) > 60
    missing = [o for o in options if not re.search(rf'"{o}"|\b{o[2:]} |[" ]{o}[" ]', tests)]
    assert set(missing) <= parametrized
