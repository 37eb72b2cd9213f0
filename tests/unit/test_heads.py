"""Reward heads: their layers, where they start, and saved heads."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from turn_sets import trajectory, turn_set

from geli.heads import encoder_of_head, encoder_reference, find_head, load_reward_head, save_reward_head, saved_heads
from geli.run.errors import UserError
from models import (
    HEADS,
    HeadOptions,
    RewardHead,
    RewardHeadConfig,
    RudderCells,
    head_rewards,
    ircr_loss,
    rudder_rewards,
)


def head_config(**changes) -> RewardHeadConfig:
    values = dict(
        head="small_model_shrink", hidden=16, encoder="lang_model_x", encoder_is_folder=True, max_length=512,
        context_turns=20, stage=1, reward_class="overall_affect",
    )  # fmt: skip
    return RewardHeadConfig(**{**values, **changes})


def make_head(**changes) -> RewardHead:
    torch.manual_seed(0)
    return RewardHead(head_config(**changes))


FEATURES = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))

# ---------------------------------------------------------------------------------------------------------------------
# Layers


def layers_of(kind: str) -> list[str]:
    def name(layer):
        if isinstance(layer, torch.nn.Linear):
            return f"{layer.in_features}>{layer.out_features}"
        return type(layer).__name__

    return [name(layer) for layer in make_head(head=kind).layers]


def test_each_heads_layers():
    default, norm = ["16>768", "ReLU", "768>128", "ReLU", "128>32", "ReLU", "32>1"], ["LayerNorm", "ReLU"]
    published = {
        "default": default,
        "hard_shrink": [*default, "GELU"],
        "batch_norm": ["16>768", *norm, "768>128", *norm, "128>32", *norm, "32>1"],
        "small_model": ["16>128", "ReLU", "128>32", "ReLU", "32>1"],
        "small_model_shrink": ["16>128", "Dropout", "ReLU", "128>1", "Tanh"],
        "published": ["16>128", "Dropout", "ReLU", "128>1", "Dropout", "Tanh"],
        "rudder": ["RudderCells", "16>1"],
    }
    assert {kind: layers_of(kind) for kind in published} == published


def test_an_option_chooses_each_head_that_is_selectable():
    assert HeadOptions().chosen == "default"
    selectable = [name for name, head in HEADS.items() if head.selectable]
    assert {"small_model_shrink", "small_model", "batch_norm", "hard_shrink"} <= {*selectable}
    assert not {"default", "published", "rudder"} & {*selectable}
    assert [HeadOptions(**{name: True}).chosen for name in selectable] == selectable


def test_the_shrunken_head_is_bounded_and_drops_out_only_in_training():
    head, features = make_head(), 100 * FEATURES
    assert head.eval()(features).abs().max() <= 1
    assert torch.equal(head(features), head(features))
    assert not torch.equal(head.train()(features), head(features))
    assert [m.p for m in head.modules() if isinstance(m, torch.nn.Dropout)] == [0.2]


def test_a_new_head_returns_in_evaluation_what_training_fitted():
    """All turns have one target. The published layers drop a fifth of the rewards in training: of a loss of single
    turns the others reach the target, and evaluation, which drops none but does not scale them either, misses it."""
    fitted, target = {}, 0.45
    for kind in ("small_model_shrink", "published"):
        head = make_head(head=kind)
        optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3)
        for _ in range(400):
            ircr_loss(head(FEATURES.repeat(20, 1)).squeeze(1), 160 * target, 160).backward()
            optimizer.step()
            optimizer.zero_grad()
        fitted[kind] = head.eval()(FEATURES).mean().item()
    assert fitted["small_model_shrink"] == pytest.approx(target, abs=0.01)
    assert fitted["published"] == pytest.approx(np.tanh(0.8 * np.arctanh(target)), abs=0.01)  # 0.37


def test_the_mean_over_dropout_is_the_output_in_evaluation():
    """Up to tanh, of which it is the input: dropout before ReLU keeps the mean of the last layer exactly."""
    head = make_head()
    torch.manual_seed(1)
    before_tanh = head.layers[:-1]
    samples = torch.stack([before_tanh.train()(FEATURES) for _ in range(4000)])
    error = samples.std(dim=0) / 4000**0.5
    assert ((samples.mean(dim=0) - before_tanh.eval()(FEATURES)).abs() < 5 * error).all()


@pytest.mark.parametrize("kind", HEADS)
def test_the_hidden_layer_of_a_head_is_the_input_of_its_last_linear_layer(kind):
    head = make_head(head=kind).eval()
    outputs, hidden = head(FEATURES, with_hidden=True)
    last = [i for i, layer in enumerate(head.layers) if isinstance(layer, torch.nn.Linear)][-1]
    assert torch.equal(outputs, head(FEATURES)) and len(hidden) == len(FEATURES)
    torch.testing.assert_close(head.layers[last:](hidden), outputs[1:] if head.sequential else outputs)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_can_start_at_a_constant(kind):
    head = make_head(head=kind).eval()
    head.init_constant(0.3)
    outputs = head(FEATURES).squeeze(1)
    assert outputs.tolist() == pytest.approx([0.3] * (len(FEATURES) + head.sequential), abs=1e-6)
    assert kind == "published" or torch.equal(head.train()(FEATURES).squeeze(1), outputs)
    assert head.rewards(outputs, 160).tolist() == pytest.approx([0.3 / (160 if head.sequential else 1)] * len(FEATURES))
    head(FEATURES).sum().backward()
    last = [layer for layer in head.layers if isinstance(layer, torch.nn.Linear)][-1]
    assert last.weight.grad.abs().sum() > 0  # it can be trained from there


def test_rudders_cells_by_hand():
    cells = RudderCells(1, cells=1)
    with torch.no_grad():
        for p, value in zip(cells.parameters(), (2.0, 0.0, 3.0, -1.0), strict=True):  # W, a; U, b
            p.fill_(value)
    # x = 1, then -0.5; h_0 = 0: gate sigmoid(-1) = 0.26894, input tanh(2) = 0.96403: c_1 = 0.25927, h_1 = 0.25361
    # gate sigmoid(3 * 0.25361 - 1) = 0.44051, input tanh(-1) = -0.76159: c_2 = 0.25927 - 0.33549 = -0.07622
    expected = [0, 0.25361, np.tanh(-0.07622)]  # the first is before any turn
    assert cells(torch.tensor([[1.0], [-0.5]])).flatten().tolist() == pytest.approx(expected, abs=2e-5)


def test_rudders_predictions_depend_on_earlier_turns_only_and_its_rewards_on_their_differences():
    head = make_head(head="rudder", redist_type="RUDDER", ep_len=20).eval()
    assert head.sequential and not make_head().sequential
    predictions = head(FEATURES)
    assert predictions[0].item() == head.layers[-1].bias.item()  # the state before the first turn is 0
    torch.testing.assert_close(head(FEATURES[:4]), predictions[:5])
    both = torch.stack([FEATURES, FEATURES.flip(0)])  # several trajectories at once
    torch.testing.assert_close(head(both)[0], predictions)
    predictions, n = predictions.squeeze(1), len(FEATURES)
    torch.testing.assert_close(head.rewards(predictions, n), rudder_rewards(predictions, 20.0, n))
    actual = make_head(head="rudder", ep_len="actual")
    torch.testing.assert_close(actual.rewards(predictions, n), rudder_rewards(predictions, n, n))
    numbers = torch.tensor([[9.0], [5.0]])  # T of each
    each = torch.stack([head.rewards(predictions, float(t)) for t in numbers])
    torch.testing.assert_close(head.rewards(torch.stack([predictions] * 2), numbers), each)


def test_head_rewards_begin_anew_with_each_trajectory():
    turns = turn_set(trajectory("a", 50.0, ["neutral"] * 4), trajectory("b", 50.0, ["neutral"] * 5))
    head = make_head(head="rudder").train()
    rewards = head_rewards(head, FEATURES, turns)
    assert head.training and rewards.dtype == np.float32
    parts = FEATURES[:4], FEATURES[4:]
    expected = torch.cat([head.rewards(head.eval()(part).squeeze(1), len(part)) for part in parts]).tolist()
    assert rewards.tolist() == pytest.approx(expected)
    plain = make_head().train()  # no dropout, and no turns needed
    assert head_rewards(plain, FEATURES).tolist() == pytest.approx(plain.eval()(FEATURES).squeeze(1).tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Saved heads


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_survives_saving_and_comes_back_in_eval_mode(tmp_path, kind):
    head = make_head(head=kind)
    save_reward_head(head, tmp_path / "reward1_x")
    again = load_reward_head(tmp_path / "reward1_x")
    assert not again.training and again.config == head.config
    assert torch.equal(again(FEATURES), head.eval()(FEATURES))
    assert again(FEATURES).shape == (9 + head.sequential, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["reward1_x"]


def test_a_head_finds_its_encoder_when_the_folders_are_moved(tmp_path):
    (tmp_path / "a" / "lang_model_x").mkdir(parents=True)
    save_reward_head(make_head(), tmp_path / "a" / "reward1_x")
    (tmp_path / "a").rename(tmp_path / "b")
    path = tmp_path / "b" / "reward1_x"
    assert encoder_of_head(load_reward_head(path).config, path) == str(tmp_path / "b" / "lang_model_x")
    reference = encoder_reference(tmp_path / "b" / "lang_model_x", tmp_path / "c" / "d")
    assert reference == {"encoder": "../../b/lang_model_x", "encoder_is_folder": True}
    assert encoder_reference("org/name", tmp_path) == {"encoder": "org/name", "encoder_is_folder": False}


def test_what_is_no_head_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such reward head"):
        load_reward_head(tmp_path / "reward1_missing")
    (tmp_path / "reward1_text").write_text("hello")
    with pytest.raises(UserError, match="expected a reward head"):
        load_reward_head(tmp_path / "reward1_text")
    save_file({"a": torch.zeros(1)}, tmp_path / "reward1_other")
    with pytest.raises(UserError, match="not a reward head"):
        load_reward_head(tmp_path / "reward1_other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 7}, "its tensors are"),
        ({"hidden": "16"}, "hidden: expected int, found '16'"),
        ({"head": "huge"}, "head: unknown: 'huge'"),
        ({"stage": 3}, "stage: unknown: 3"),
        ({"max_length": 0}, "max_length: expected at least 1"),
        ({"encoder": "/tmp/x"}, "expected a folder relative to the head's"),
    ],
)
def test_a_head_that_does_not_fit_its_configuration_is_refused(tmp_path, changes, message):
    config = {"format": "geli-reward-head-1", **head_config().__dict__, **changes}
    save_file(make_head().state_dict(), tmp_path / "reward1_odd", {"config": json.dumps(config)})
    with pytest.raises(UserError, match="does not fit its own configuration") as error:
        load_reward_head(tmp_path / "reward1_odd")
    assert message in str(error.value)


def test_a_head_is_found_by_its_path_or_its_runs_name(tmp_path):
    for name in ("a/reward1_one", "b/reward1_two", "c/reward1_two"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_reward_head(make_head(), tmp_path / name)
    (tmp_path / "a" / "reward1_one.json").touch()
    assert {path.name for path in saved_heads(tmp_path)} == {"reward1_one", "reward1_two"}
    one = tmp_path / "a/reward1_one"
    assert find_head("one", tmp_path) == find_head(str(one), "/") == one
    assert find_head("two", tmp_path, "b*") == tmp_path / "b/reward1_two"
    with pytest.raises(UserError, match="two: 2 runs have that name"):
        find_head("two", tmp_path)
    with pytest.raises(UserError, match=r"three: expected a run name .*; runs there: one, two, two"):
        find_head("three", tmp_path)
