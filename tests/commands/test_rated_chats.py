"""Rated chats through the commands of docs/rated-chats.md, in small."""

import json

import numpy as np
import pandas as pd
import pytest
from accelerate import Accelerator
from conftest import call_script

import train_reward_LI_only
from data_utils import DataOptions, SignalOptions, load_turns
from geli.heads import load_reward_head
from models import RewardHead, RewardHeadConfig
from tools.sample_chats import chats


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    _header, *lines = chats(24, turns=8, thumbs=0.3, seed=0)
    path.write_text("\n".join(map(json.dumps, [*lines, {"id": "unrated", "messages": lines[0]["messages"]}])))
    return path


@pytest.fixture(scope="module")
def runs(file, tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    common = ["--data_dir", file, "--rating_range", 1, 5, "--output_dir", out, "--context_turns", 2, "--val"]
    common += ["--small_model_shrink", "--epochs", 2, "--contrastive"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        li = ("--lang_model_path", tiny / "bart", "--li_signal", "reaction", "--run_name", "li", "--batch_size", 8)
        printed = call_script("train_reward_LI_only.py", *common, *li).stdout
        geli = ("--train", "--affect_path", "li", "--run_name", "geli")
        printed += call_script("train_reward_GELI.py", *common, *geli).stdout
    return out, printed


def test_thumbs_and_ratings_are_learned_from_and_what_is_dropped_is_named(runs, file):
    out, printed = runs
    assert printed.count("Dropped 1 of 25 conversations:\n  chats.jsonl:25: no rating") == 2
    assert printed.count("turns have a reaction (reaction)") == 2
    assert "trajectories: the user has no survey row" not in printed  # nobody asked the assistant
    for run in ("li", "geli"):
        (record,) = (json.loads(path.read_text()) for path in out.glob(f"*/reward1_{run}.json"))
        assert np.isfinite(record["metrics"]["validation"]["li_loss"])
        assert record["arguments"]["rating_range"] == [1, 5] and record["arguments"]["li_signal"] in (None, "reaction")
    (table,) = (pd.read_csv(path) for path in out.glob("SINGLE*/val_turn_rewards_li.csv"))
    assert table["target"].isna().any() and table["target"].notna().any() and table["affect"].isna().all()


def test_hindsight_goes_through_both_stages(file, tiny, tmp_path):
    common = ["--data_dir", file, "--rating_range", 1, 5, "--output_dir", tmp_path, "--context_turns", 1, "--val"]
    common += ["--small_model_shrink", "--epochs", 1, "--reaction_type", "mean"]
    li = ("--lang_model_path", tiny / "bart", "--li_signal", "hindsight", "--run_name", "li")
    printed = call_script("train_reward_LI_only.py", *common, *li).stdout
    printed += call_script(
        "train_reward_GELI.py", *common, "--train", "--affect_path", "li", "--run_name", "geli"
    ).stdout
    assert printed.count("have not seen: r = ") == 4 and "turns have a reaction (hindsight)" in printed
    first, second = (pd.read_csv(*tmp_path.glob(f"*/val_turn_rewards_{run}.csv")) for run in ("li", "geli"))
    assert np.array_equal(first["target"], second["target"], equal_nan=True) and first["target"].nunique() > 2
    options = train_reward_LI_only.parse_options([str(word) for word in (*common, "--li_signal", "hindsight")])
    _, _, validation = load_turns(options.data, options.signal, cache=None, validate=True)
    assert validation.targets == pytest.approx(first["target"].to_numpy(), abs=1e-5, nan_ok=True)
    assert load_reward_head(*tmp_path.glob("visual*/reward1_geli")).config.li_signal == "hindsight"


def test_no_thumb_can_count_as_neutral(file):
    words = [
        "--data_dir",
        str(file),
        "--rating_range",
        "1",
        "5",
        "--li_signal",
        "reaction",
        "--unknown_reaction",
        "neutral",
    ]
    options = train_reward_LI_only.parse_options(words)
    _, training, _ = load_turns(options.data, options.signal, cache=None, validate=True)
    assert not np.isnan(training.targets).any() and (training.targets[~training.known] == 0).all()


def test_stage_1_learns_from_the_turns_with_a_thumb_alone(file):
    _, training, _ = load_turns(
        DataOptions(str(file), (1, 5), context_turns=2), SignalOptions("reaction"), cache=None, validate=True
    )
    known = {i for i, target in enumerate(training.targets) if not np.isnan(target)}
    assert 0 < len(known) < len(training)

    class Encoder:
        encoder = None

        def tokenize(self, texts):
            return [type("Pair", (), {"ids": text[1].split()}) for text in texts]

        def trainable(self):
            return []

        def remember(self, pairs, autocast=None):
            pass

        def train(self, mode=True):
            return self

    head = RewardHead(RewardHeadConfig("small_model_shrink", 4, "x", False, 9, 2, 1, "overall_affect"))
    options = train_reward_LI_only.LITrainingOptions(epochs=2, batch_size=4)
    stage = train_reward_LI_only.LITraining(
        Encoder(), head, training, None, options, Accelerator(cpu=True), 0, lambda: None
    )
    drawn = [turn for _, batch in stage.batches for turn in batch.tolist()]
    assert set(drawn) == known and len(drawn) == 2 * len(known)


def test_heads_are_measured_by_turn_ratings_and_label_the_chats(runs, file, tmp_path):
    out, _ = runs
    common = ["--data_dir", file, "--rating_range", 1, 5, "--output_dir", out, "--repetitions", 20]
    printed = call_script("tools/evaluate_rewards.py", "geli", "li", *common, "--val_all").stdout
    assert "ρ labels" in printed and "given place" in printed
    table = pd.read_csv(out / "rewards.csv").set_index(["reward", "metric"])["value"]
    assert -1 <= table["geli", "label_within"] <= 1 and np.isnan(table["mean", "label_within"])
    labels = tmp_path / "labels.csv"
    labels.write_text("conversation_id,turn_id,label\nnobody,0,1\n")
    refused = call_script("tools/evaluate_rewards.py", "geli", *common, "--turn_labels", labels, check=2)
    assert "has no label of the" in refused.stderr
    there = ("--reward_path", "geli", "--output_dir", out, "--out", tmp_path / "s.csv", "--device", "cpu")
    call_script("apps.label", file, *there)
    scored = pd.read_csv(tmp_path / "s.csv")
    assert scored["reward"].notna().tolist() == (scored["speaker"] == "assistant").tolist()
    assert "unrated" in set(scored["conversation_id"])
