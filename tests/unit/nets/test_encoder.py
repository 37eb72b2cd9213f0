"""The text encoder: formats of pairs, truncation, features, gradients, saving."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3Model

from geli.heads import encoder_of_head, encoder_reference, load_encoder_of_head
from geli.nets.batching import CPU_TOKENS, shuffled_batches, token_batches
from geli.nets.encoder import TurnEncoder, load_encoder, place_encoder
from geli.nets.options import EncoderOptions
from geli.nets.trunk import Trunk
from geli.run.errors import UserError


@pytest.fixture(scope="module")
def encoder(tiny) -> TurnEncoder:
    return load_encoder(str(tiny / "bart")).eval()


def test_pairs_have_the_encoders_own_format(encoder):
    pair = encoder.tokenize([(" User: hello there", "AI: hi")])[0]
    assert encoder.tokenizer.decode(pair.ids) == "<s> User: hello there</s></s>AI: hi</s>"
    assert pair.ids.tolist() == encoder.tokenizer(" User: hello there", "AI: hi")["input_ids"]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 40), st.integers(8, 60))
def test_too_long_pairs_lose_the_left_end_of_the_context_then_of_the_response(encoder, n_context, n_response, limit):
    short = TurnEncoder(encoder.model, encoder.tokenizer, limit)
    context, response = " ok" * n_context, " hm" * n_response
    whole, cut = encoder.tokenize([(context, response)])[0], short.tokenize([(context, response)])[0]
    tokens = [short.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, response)]
    room = limit - 4
    kept_response = tokens[1][-room:]
    kept_context = tokens[0][len(tokens[0]) - min(len(tokens[0]), room - len(kept_response)) :]
    assert cut.ids.tolist() == [0, *kept_context, 2, 2, *kept_response, 2]
    assert len(cut.ids) == min(limit, len(whole.ids))


def test_a_response_longer_than_the_encoder_is_no_error(encoder):
    pair = encoder.tokenize([(" User: hi", "AI: " + "word " * 2000)])[0]
    assert len(pair.ids) == encoder.max_length == 512
    assert torch.isfinite(encoder.encode([pair])).all()


def test_the_representation_is_the_last_hidden_state_at_the_last_end_token(encoder):
    texts = [(" User: a", "AI: b"), (" User: a much longer context than that", "AI: and a longer answer too")]
    pairs = encoder.tokenize(texts)
    features = encoder.encode(pairs)
    for pair, feature in zip(pairs, features, strict=True):
        ids = torch.tensor(pair.ids[None].astype(int))
        hidden = encoder.model.get_encoder()(input_ids=ids).last_hidden_state[0]
        last = int(np.flatnonzero(pair.ids == encoder.tokenizer.eos_token_id)[-1])
        torch.testing.assert_close(feature, hidden[last], atol=2e-6, rtol=1e-5)


def test_features_do_not_depend_on_the_batch(encoder):
    pairs = encoder.tokenize([(" User: " + "yes " * n, "AI: no") for n in (1, 50, 3, 20)])
    encoder.tokens_per_batch = 1
    one_by_one = encoder.encode(pairs)
    encoder.tokens_per_batch = None
    torch.testing.assert_close(encoder.encode(pairs), one_by_one, atol=5e-6, rtol=1e-5)


def test_the_decoder_is_never_run(encoder, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the decoder ran")

    monkeypatch.setattr(type(encoder.model.get_decoder()), "forward", fail)
    encoder.encode(encoder.tokenize([("", "AI: hi")]))


def test_an_encoder_survives_saving(encoder, tmp_path):
    encoder.save(tmp_path / "lang_model_x")
    again = load_encoder(str(tmp_path / "lang_model_x"))
    pairs = encoder.tokenize([(" User: a", "AI: b")])
    assert torch.equal(again.encode(again.tokenize([(" User: a", "AI: b")])), encoder.encode(pairs))


def test_every_process_gathers_a_sharded_encoder_and_only_the_main_one_writes(tiny, tmp_path, monkeypatch):
    model, calls = load_encoder(str(tiny / "bart")), []
    model.is_sharded, model.largest = True, lambda n: n
    monkeypatch.setattr("geli.nets.encoder.full_state", lambda module: calls.append("gather") or module.state_dict())
    write = model.model.save_pretrained
    monkeypatch.setattr(
        model.model, "save_pretrained", lambda *args, **more: calls.append("write") or write(*args, **more)
    )
    for rank, expected in (("1", ["gather"]), ("0", ["gather", "write"])):
        calls.clear()
        monkeypatch.setenv("RANK", rank)
        model.save(tmp_path / "saved")
        assert calls == expected and (tmp_path / "saved").exists() == (rank == "0")


def test_an_encoder_that_cannot_be_loaded_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--lang_model_path nobody/nothing: this hub id .* could not be loaded"):
        load_encoder("nobody/nothing")


# ---------------------------------------------------------------------------------------------------------------------
# Encoders of every architecture that an alias stands for

PAIR_FORMATS = {
    "bart": "<s>{}</s></s>{}</s>",
    "longformer": "<s>{}</s></s>{}</s>",
    "longt5": "{}</s>{}</s>",
    "llama-encoder": "<s>{}<s>{}</s>",  # its tokenizer puts no end token: one is added
}


@pytest.fixture(scope="module", params=PAIR_FORMATS)
def architecture(request, sample, tmp_path_factory):
    """(kind, its encoder)"""
    folder = small_model(request.param, tmp_path_factory.mktemp("small") / request.param, sample)
    adapt = request.param == "llama-encoder"
    torch.manual_seed(0)
    return request.param, load_encoder(str(folder), adapt=adapt).eval()


TURN = (" User: what do you enjoy the most about cooking?", "AI: I read that it has changed a lot")


def test_every_architecture_gets_its_own_pair_formatat(architecture):
    kind, encoder = architecture
    pair = encoder.tokenize([TURN])[0]
    assert encoder.tokenizer.decode(pair.ids) == PAIR_FORMATS[kind].format(*TURN)
    assert pair.ids[-1] == encoder.tokenizer.eos_token_id


def test_every_architecture_keeps_the_response_when_it_cuts(architecture):
    _, encoder = architecture
    assert encoder.max_length == 256
    pair = encoder.tokenize([(TURN[0] * 60, TURN[1])])[0]
    assert len(pair.ids) == 256 and encoder.tokenizer.decode(pair.ids).endswith(TURN[1] + "</s>")
    long = encoder.tokenize([(TURN[0], "AI: begin" + " on" * 600 + " end")])[0]
    text = encoder.tokenizer.decode(long.ids)
    assert len(long.ids) == 256 and text.endswith(" end</s>") and "begin" not in text and "User" not in text


def test_every_architecture_is_read_at_the_last_end_token_whatever_the_padding(architecture):
    _, encoder = architecture
    pairs = encoder.tokenize([TURN, (TURN[0] * 9, TURN[1] * 2), ("", "AI: hm")])
    features = encoder.encode(pairs)
    for pair, feature in zip(pairs, features, strict=True):
        ids = torch.tensor(pair.ids[None].astype(int))
        hidden = encoder.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        torch.testing.assert_close(feature, hidden[-1], atol=2e-5, rtol=1e-4)


def test_every_architecture_trains_and_survives_saving(architecture, tmp_path):
    kind, encoder = architecture
    pairs = encoder.tokenize([TURN, ("", "AI: hm")])
    before, total = encoder.encode(pairs), sum(p.numel() for p in encoder.model.parameters())
    optimizer = torch.optim.SGD(encoder.trainable(), lr=0.1)
    for _ in range(2):  # LoRA's second factor starts at 0: one step does not reach the first
        optimizer.zero_grad()
        encoder.encode_with_gradients(pairs).square().sum().backward()
        optimizer.step()
    after = encoder.encode(pairs)
    assert not torch.allclose(before, after)
    encoder.save(tmp_path / "lang_model_x")
    again = load_encoder(str(tmp_path / "lang_model_x"))
    torch.testing.assert_close(again.encode(again.tokenize([TURN, ("", "AI: hm")])), after, atol=1e-6, rtol=1e-5)
    if kind == "llama-encoder":  # an adapter alone: r=8, alpha=16, dropout 0.1
        config = json.loads((tmp_path / "lang_model_x" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.1)
        assert not (tmp_path / "lang_model_x" / "model.safetensors").exists()
        assert sum(p.numel() for p in encoder.trainable()) < total / 3
        assert again.trainable()  # a loaded adapter can be trained further


def test_gradients_in_batches_are_those_of_one_batch(architecture, monkeypatch):
    _, encoder = architecture
    pairs = encoder.tokenize([TURN, (TURN[0] * 4, TURN[1]), ("", "AI: hm")])
    gradients = []
    for tokens, in_a_pass in ((None, CPU_TOKENS), (None, 1), (1, CPU_TOKENS)):  # the last computes activations anew
        encoder.tokens_per_batch = tokens
        monkeypatch.setattr("geli.nets.encoder.CPU_TOKENS", in_a_pass)
        encoder.zero_grad()
        features = encoder.encode_with_gradients(pairs)
        torch.testing.assert_close(features, encoder.encode(pairs), atol=2e-5, rtol=1e-4)
        (features * torch.arange(3.0)[:, None]).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in encoder.trainable() if p.grad is not None]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Frozen layers


@pytest.mark.parametrize("kind", ["bart", "bert", "longformer"])
def test_above_frozen_layers_nothing_changes_but_the_time(kind, tmp_path, sample):
    encoder = load_encoder(str(small_model(kind, tmp_path / kind, sample)))
    texts = [TURN, (TURN[0] * 4, TURN[1]), ("", "AI: hm")]
    pairs, whole = encoder.tokenize(texts), load_encoder(str(tmp_path / kind))
    encoder.freeze_layers(1)
    trained = encoder._trunk.layers
    assert {id(p) for p in encoder.trainable()} == {id(p) for p in trained.parameters()} and len(trained) >= 1
    assert not encoder._below
    encoder.remember(pairs[:2])
    encoder.remember(pairs)
    assert {key: len(states) for key, states in encoder._below.items()} == {p.key: len(p.ids) for p in pairs}
    torch.testing.assert_close(encoder.encode(pairs), whole.encode(pairs), atol=1e-5, rtol=1e-4)
    gradients = []
    for each in (encoder.eval(), whole.eval()):
        each.encode_with_gradients(pairs).square().sum().backward()
        top = dict(each.model.named_parameters())
        gradients.append([top[name].grad for name, p in encoder.model.named_parameters() if p.requires_grad])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert all(p.grad is None for p in encoder.encoder.parameters() if not p.requires_grad)


def test_frozen_layers_have_no_dropout_and_the_others_do(tiny):
    encoder = load_encoder(str(tiny / "bart"))
    encoder.freeze_layers(1)
    encoder.train()
    off = [m for m in encoder.modules() if not m.training]
    assert all(m.training for m in encoder._trunk.layers.modules()) and encoder.encoder.layers[0] in off
    encoder.encode(encoder.tokenize([TURN]))  # which goes to eval mode and back
    assert off == [m for m in encoder.modules() if not m.training]
    encoder.eval()
    assert not any(m.training for m in encoder.modules())


def test_states_that_do_not_fit_are_computed_anew(tiny, monkeypatch, capsys):
    encoder = load_encoder(str(tiny / "bart")).eval()
    pairs = encoder.tokenize([TURN])
    expected = encoder.encode(pairs)
    encoder.freeze_layers(1)
    monkeypatch.setattr(
        "geli.nets.encoder.available_memory", lambda: 4 * 4 * encoder.hidden_size * len(pairs[0].ids) - 1
    )
    encoder.remember(pairs)
    assert "they are computed anew in every pass" in capsys.readouterr().out and not encoder._below
    assert torch.equal(encoder.encode(pairs), expected)


def test_encoders_without_frozen_layers_are_refused(tiny, architecture):
    kind, encoder = architecture
    if kind in ("llama-encoder", "longt5"):  # an adapter in all layers; a position bias that the first layer makes
        with pytest.raises(UserError, match=r"--freeze_layers 1: .* has no frozen layers: its "):
            encoder.freeze_layers(1)


def test_frozen_layers_that_cannot_be_are_refused(tiny):
    encoder = load_encoder(str(tiny / "bart"))
    with pytest.raises(UserError, match=r"--freeze_layers 2: .* has no frozen layers: it has 2 layers, and one must"):
        encoder.freeze_layers(2)
    with pytest.raises(UserError, match="--compile is for whole encoders"):
        options = EncoderOptions(compile=True, freeze_layers=1)
        place_encoder(encoder, SimpleNamespace(device=torch.device("cpu")), options)
    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    kinds = dict(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"], sliding_window=8)
    with pytest.raises(ValueError, match="attention of several kinds"):
        Trunk(Qwen3Model(Qwen3Config(**sizes, **kinds, vocab_size=32)), 1)


# ---------------------------------------------------------------------------------------------------------------------
# The encoder of a head, options, batches


def head(encoder, is_folder=True, hidden=32):
    return SimpleNamespace(encoder=encoder, encoder_is_folder=is_folder, hidden=hidden)


def test_a_head_finds_its_encoder_wherever_the_folders_are_moved(tmp_path):
    (tmp_path / "b" / "lang_model_x").mkdir(parents=True)
    found = encoder_of_head(head("lang_model_x"), tmp_path / "b" / "reward1_x")
    assert found == str(tmp_path / "b" / "lang_model_x")
    reference = encoder_reference(tmp_path / "b" / "lang_model_x", tmp_path / "c" / "d")
    assert reference == {"encoder": os.path.join("..", "..", "b", "lang_model_x"), "encoder_is_folder": True}
    assert encoder_reference("org/name", tmp_path) == {"encoder": "org/name", "encoder_is_folder": False}


def test_a_heads_encoder_must_exist_and_have_its_width(sample, tmp_path):
    small_model("bart", tmp_path / "lang_model_x", sample)
    path = tmp_path / "reward1_x"
    assert load_encoder_of_head(head("lang_model_x"), path, 256, None).hidden_size == 32
    with pytest.raises(UserError, match="found no such folder"):
        load_encoder_of_head(head("lang_model_gone"), path, 256, None)
    with pytest.raises(UserError, match=r"takes 64 features, its encoder .* gives 32"):
        load_encoder_of_head(head("lang_model_x", hidden=64), path, 256, None)
    for named in ("another/encoder", str(tmp_path / "lang_model_x")):  # given, so used or refused
        with pytest.raises(UserError, match=rf"--lang_model_path {named}: .* records its own encoder, lang_model_x"):
            load_encoder_of_head(head("lang_model_x"), path, 256, named)
    assert load_encoder_of_head(head(None), path, 256, str(tmp_path / "lang_model_x")).hidden_size == 32


def test_the_option_that_names_the_encoder():
    assert EncoderOptions().source() == ("kabita-choudhary/finetuned-bart-for-conversation-summary", "--model")
    assert EncoderOptions(model="org/name").source() == ("org/name", "--model")
    assert EncoderOptions(lang_model_path="./x").source() == ("./x", "--lang_model_path")
    assert EncoderOptions(model="LLAMA2").adapted
    assert not EncoderOptions().adapted and not EncoderOptions(model="org/name").adapted


def test_an_encoder_is_placed_with_its_options(tiny, monkeypatch):
    encoder, accelerator = load_encoder(str(tiny / "bart")), SimpleNamespace(device=torch.device("cpu"))
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled.append((module, options)) or module)
    placed = place_encoder(encoder, accelerator, EncoderOptions(tokens_per_batch=200))
    assert placed.token_budget() == 200 and not compiled
    place_encoder(encoder, accelerator, EncoderOptions(compile=True))
    assert compiled == [(encoder.encoder, {"dynamic": True})]
    pairs = encoder.tokenize([TURN])
    assert torch.equal(encoder.encode(pairs), load_encoder(str(tiny / "bart")).encode(pairs))
    encoder.is_sharded, encoder.largest = True, lambda n: n
    with pytest.raises(UserError, match="--compile does not work on a sharded encoder"):
        place_encoder(encoder, accelerator, EncoderOptions(compile=True))


def test_tokens_per_batch_bounds_each_forward_pass(tiny, monkeypatch):
    encoder, seen = load_encoder(str(tiny / "bart")), []
    forward = TurnEncoder.forward

    def watch(self, input_ids, attention_mask, **more):
        seen.append(input_ids.numel())
        return forward(self, input_ids, attention_mask, **more)

    monkeypatch.setattr(TurnEncoder, "forward", watch)
    pairs = encoder.tokenize([(" User: " + "well " * n, "AI: hm") for n in range(40)])
    encoder.tokens_per_batch = 100
    encoder.encode(pairs)
    encoder.encode_with_gradients(pairs)
    assert max(seen) <= 100
    seen.clear()
    encoder.tokens_per_batch = None
    encoder.encode(pairs)
    assert len(seen) == 3 and max(seen) <= CPU_TOKENS
    seen.clear()
    encoder.encode_with_gradients(pairs)
    assert len(seen) == 2 and max(seen) <= 2 * CPU_TOKENS


def test_the_processes_of_a_sharded_encoder_make_the_same_number_of_passes(tiny, monkeypatch):
    encoder, seen = load_encoder(str(tiny / "bart")).eval(), []
    pairs = encoder.tokenize([(" User: " + "well " * n, "AI: hm") for n in range(3)])
    expected, forward = encoder.encode(pairs), TurnEncoder.forward

    def watch(self, input_ids, attention_mask, **more):
        seen.append(input_ids.shape)
        return forward(self, input_ids, attention_mask, **more)

    monkeypatch.setattr(TurnEncoder, "forward", watch)
    encoder.is_sharded, encoder.largest = True, lambda n: max(n, 4)  # another process has four batches
    for rows, expect in ((pairs, expected), ([], expected[:0])):
        for encode in (encoder.encode, encoder.encode_with_gradients):
            seen.clear()
            torch.testing.assert_close(encode(rows), expect, atol=5e-6, rtol=1e-5)
            assert len(seen) == 4


LENGTHS = st.lists(st.integers(1, 50), max_size=60).map(np.array)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 9))
def test_shuffled_batches_have_every_index_once(lengths, size, seed):
    batches = shuffled_batches(lengths, size, np.random.default_rng(seed), pool=3)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= size for batch in batches)
    again = shuffled_batches(lengths, size, np.random.default_rng(seed), pool=3)
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in again]


@given(LENGTHS, st.integers(1, 120), st.none() | st.integers(1, 9))
def test_token_batches_have_every_index_once_within_the_budget_longest_first(lengths, budget, most):
    batches = token_batches(lengths, budget, most)
    assert all(len(batch) <= (most or len(lengths)) for batch in batches)
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[batch]) <= budget for batch in batches)
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
