"""Encoded turns: the on-disk cache is used when it holds what was asked for, and never otherwise."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import small_model

from geli.nets import features as features_module
from geli.nets.encoder import TurnEncoder, load_encoder
from geli.nets.features import FeatureCache, TurnFeatures, encode_together, encoder_fingerprint


@pytest.fixture(scope="module")
def encoder(tiny):
    return load_encoder(str(tiny / "bart")).eval()


TEXTS = [(" User: hello", f"AI: answer number {n % 7}") for n in range(20)]


class Counted:
    """An encoder that counts the pairs it encodes."""

    def __init__(self, encoder):
        self.encoder, self.pairs = encoder, 0

    def __call__(self, pairs, on_batch):
        self.pairs += len(pairs)
        return self.encoder.encode(pairs, on_batch=on_batch)


def test_each_distinct_turn_is_encoded_once_ever(encoder, tmp_path):
    pairs, encode = encoder.tokenize(TEXTS), Counted(encoder)
    key = encoder_fingerprint(encoder, "cpu no")
    first = FeatureCache(tmp_path, key).encode(pairs, encode)
    assert encode.pairs == 7
    torch.testing.assert_close(first, encoder.encode(pairs), atol=2e-6, rtol=1e-5)
    again = FeatureCache(tmp_path, key)
    assert torch.equal(again.encode(pairs[::-1], encode), first.flip(0)) and encode.pairs == 7
    again.encode(encoder.tokenize([*TEXTS, ("", "AI: new")]), encode)
    assert encode.pairs == 8
    FeatureCache(tmp_path, key).encode(encoder.tokenize([("", "AI: new")]), encode)
    assert encode.pairs == 8


def test_other_weights_text_cuts_or_numerics_are_other_features(encoder, tiny, tmp_path):
    key = encoder_fingerprint(encoder, "cpu no")
    assert key == encoder_fingerprint(load_encoder(str(tiny / "bart")), "cpu no")
    assert key != encoder_fingerprint(encoder, "cpu bf16")
    other = load_encoder(str(tiny / "bart"))
    with torch.no_grad():
        next(other.encoder.parameters()).view(-1)[0] += 1e-6
    assert key != encoder_fingerprint(other, "cpu no")
    encode = Counted(encoder)
    FeatureCache(tmp_path, key).encode(encoder.tokenize(TEXTS), encode)
    cut = load_encoder(str(tiny / "bart"), max_length=6).tokenize(TEXTS)  # their last tokens: all seven alike
    FeatureCache(tmp_path, key).encode(cut, encode)
    assert encode.pairs > 7


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "other encoder"])
def test_damaged_features_are_not_used(encoder, tmp_path, damage, capsys):
    key, pairs = encoder_fingerprint(encoder, "cpu no"), encoder.tokenize(TEXTS)
    encode = Counted(encoder)
    right = FeatureCache(tmp_path, key).encode(pairs, encode)
    path = next((tmp_path / key).iterdir())
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
    elif damage == "other encoder":  # a file in the wrong place
        (tmp_path / "x").mkdir()
        shutil.move(path, tmp_path / "x" / path.name)
        key = "x"
    else:
        content = content[:-7] if damage == "cut" else b"hello"
    if damage != "other encoder":
        path.write_bytes(content)
    again = FeatureCache(tmp_path, key).encode(pairs, encode)
    assert encode.pairs == 14 and torch.equal(again, right)
    assert "is not used" in capsys.readouterr().out


def test_a_killed_run_keeps_what_it_had_encoded(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "FLUSH_SECONDS", 0)
    key, pairs = encoder_fingerprint(encoder, "cpu no"), encoder.tokenize(TEXTS)

    def dies(pairs, on_batch):
        on_batch(np.arange(3), encoder.encode(pairs[:3]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path, key).encode(pairs, dies)
    (tmp_path / key / ".torn.1.tmp.safetensors").write_bytes(b"half a file")
    encode = Counted(encoder)
    FeatureCache(tmp_path, key).encode(pairs, encode)
    assert encode.pairs == 4


def test_writers_at_the_same_time_do_not_disturb_each_other(encoder, tmp_path):
    key, pairs = encoder_fingerprint(encoder, "cpu no"), encoder.tokenize(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: FeatureCache(tmp_path, key).encode(pairs, Counted(encoder)), range(4)))
    assert all(torch.allclose(part, found[0], atol=2e-6) for part in found)
    encode = Counted(encoder)
    FeatureCache(tmp_path, key).encode(pairs, encode)
    assert encode.pairs == 0


def test_two_adapters_that_differ_in_a_setting_alone_are_two_encoders(sample, tmp_path):
    folder = small_model("llama-encoder", tmp_path / "llama", sample)
    one, other = (load_encoder(str(folder), adapt=True) for _ in range(2))
    other.load_state_dict(one.state_dict())
    assert encoder_fingerprint(one, "cpu no") == encoder_fingerprint(other, "cpu no")
    other.model.peft_config["default"].lora_alpha = 64
    assert encoder_fingerprint(one, "cpu no") != encoder_fingerprint(other, "cpu no")


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def encoded(monkeypatch):
    """The number of pairs at each call of `TurnEncoder.encode`."""
    calls, encode = [], TurnEncoder.encode

    def count(self, pairs, *args, **more):
        calls.append(len(pairs))
        return encode(self, pairs, *args, **more)

    monkeypatch.setattr(TurnEncoder, "encode", count)
    return calls


RATED = [(context + " So my rating is 80.", response) for context, response in TEXTS]
CHOSEN, SHOWN = np.array([2, 5]), np.array([False, True])


def test_turns_of_a_frozen_encoder_are_encoded_once(encoder, accelerator, tmp_path, encoded):
    expected = encoder.encode(encoder.tokenize([TEXTS[2], RATED[5]]))
    encoded.clear()
    for _ in range(2):
        turns = TurnFeatures(encoder, accelerator, tmp_path)
        turns.prepare(TEXTS, RATED)
        held_out = turns.held_out(TEXTS[:3])
        assert turns.held_out(TEXTS[:3]) is held_out
        assert sum(encoded) == 14  # 7 distinct turns, each with and without the rating; the held-out ones are the same
        torch.testing.assert_close(turns.training(CHOSEN, SHOWN, 1), expected, atol=2e-6, rtol=1e-5)


def test_turns_of_an_encoder_that_trains_are_encoded_at_each_request(encoder, accelerator, tmp_path, encoded):
    expected = encoder.encode(encoder.tokenize([TEXTS[2], RATED[5]]))
    encoded.clear()
    turns = TurnFeatures(encoder, accelerator, tmp_path / "cache", frozen=False)
    turns.prepare(TEXTS, RATED)
    assert not encoded and not (tmp_path / "cache").exists()
    features = turns.training(CHOSEN, SHOWN, 1)
    assert features.requires_grad
    torch.testing.assert_close(features, expected, atol=2e-6, rtol=1e-5)
    for _ in range(2):
        turns.held_out(TEXTS[:3])
    assert encoded == [3, 3]


def test_one_process_encodes_everything(encoder, accelerator):
    pairs = encoder.tokenize(TEXTS)
    assert torch.equal(encode_together(encoder, pairs, accelerator), encoder.encode(pairs))
    assert encode_together(encoder, pairs, accelerator, lambda mine: torch.ones(len(mine), 2)).shape == (20, 2)
