"""The encoder's text form, reward heads on disk, and the policy."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import small_model
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from cli import UserError
from data_utils import INSTRUCTION, prompt_text
from models import RewardHead, RewardHeadConfig, TurnEncoder, load_encoder, load_policy, load_reward_head
from ppo import cut_responses, distinct


@pytest.fixture(scope="module")
def encoder(tiny) -> TurnEncoder:
    return load_encoder(str(tiny / "bart")).eval()


@pytest.fixture(scope="module")
def policy(tiny):
    torch.manual_seed(0)
    return load_policy(str(tiny / "llama"), 4, 8, torch.float32)


def test_pairs_have_the_encoders_own_form(encoder):
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


def head_config(**changes) -> RewardHeadConfig:
    values = dict(
        head="small_model_shrink", hidden=16, encoder="lang_model_x", encoder_is_folder=True, max_length=512,
        context_turns=20, stage=1, reward_class="overall_affect",
    )  # fmt: skip
    return RewardHeadConfig(**{**values, **changes})


@pytest.mark.parametrize("kind", models.HEADS)
def test_a_head_survives_saving_and_comes_back_in_eval_mode(tmp_path, kind):
    head = RewardHead(head_config(head=kind))
    models.save_reward_head(head, tmp_path / "reward1_x")
    again = load_reward_head(tmp_path / "reward1_x")
    assert not again.training and again.config == head.config
    features = torch.randn(5, 16)
    assert again(features).shape == (5, 1)
    assert torch.equal(again(features), head.eval()(features))


@pytest.mark.parametrize("kind", models.HEADS)
def test_a_head_can_start_at_the_targets_mean(kind):
    head = RewardHead(head_config(head=kind)).eval()
    head.start_at(0.3)
    features = torch.randn(5, 16)
    rewards = head(features).squeeze(1)
    if head.sequential:  # the first prediction is 0.3, and nothing changes it
        assert rewards.tolist() == pytest.approx([0.3, 0, 0, 0, 0], abs=1e-6)
    else:
        assert rewards.tolist() == pytest.approx([0.3] * 5, abs=1e-6)
    head(features).sum().backward()
    last = [layer for layer in head.layers if isinstance(layer, torch.nn.Linear)][-1]
    assert last.weight.grad.abs().sum() > 0  # it learns from there


def test_the_shrunken_head_is_bounded_and_drops_out_only_in_training():
    head = RewardHead(head_config())
    features = 100 * torch.randn(50, 16)
    assert head.eval()(features).abs().max() <= 1
    assert torch.equal(head(features), head(features))
    assert not torch.equal(head.train()(features), head(features))
    assert [m.p for m in head.modules() if isinstance(m, torch.nn.Dropout)] == [0.2, 0.2]


def test_a_head_finds_its_encoder_wherever_the_folders_are_moved(tmp_path):
    (tmp_path / "a" / "lang_model_x").mkdir(parents=True)
    models.save_reward_head(RewardHead(head_config()), tmp_path / "a" / "reward1_x")
    (tmp_path / "a").rename(tmp_path / "b")
    head = load_reward_head(tmp_path / "b" / "reward1_x")
    assert models.encoder_of_head(head, tmp_path / "b" / "reward1_x") == str(tmp_path / "b" / "lang_model_x")
    reference = models.encoder_reference(tmp_path / "b" / "lang_model_x", tmp_path / "c" / "d")
    assert reference == {"encoder": os.path.join("..", "..", "b", "lang_model_x"), "encoder_is_folder": True}
    assert models.encoder_reference("org/name", tmp_path) == {"encoder": "org/name", "encoder_is_folder": False}


def test_what_is_no_head_is_refused_in_words(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="no such reward head"):
        load_reward_head(tmp_path / "reward1_missing")
    (tmp_path / "reward1_text").write_text("hello")
    with pytest.raises(UserError, match="expected a reward head"):
        load_reward_head(tmp_path / "reward1_text")
    save_file({"a": torch.zeros(1)}, tmp_path / "reward1_other")
    with pytest.raises(UserError, match="not a reward head"):
        load_reward_head(tmp_path / "reward1_other")
    config = {**head_config().__dict__, "hidden": 7}
    state = RewardHead(head_config()).state_dict()
    save_file(state, tmp_path / "reward1_odd", {"config": json.dumps({"format": "geli-reward-head-1", **config})})
    with pytest.raises(UserError, match="does not fit its own configuration"):
        load_reward_head(tmp_path / "reward1_odd")


def test_an_encoder_that_cannot_be_loaded_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--lang_model_path nobody/nothing: this hub id .* could not be loaded"):
        load_encoder("nobody/nothing")


PROMPTS = ["You are AI. User: hi AI:", " User: what a long and winding question that is, is it not? AI:"]


def responses_of(policy, lengths=(5, 9)):
    generator = torch.Generator().manual_seed(1)
    response = torch.randint(5, policy.model.config.vocab_size, (2, 9), generator=generator)
    mask = (torch.arange(9)[None] < torch.tensor(lengths)[:, None]).float()
    return response, mask


def test_a_left_padded_batch_gives_what_each_sequence_gives_alone(policy):
    query, query_mask = policy.tokenize(PROMPTS)
    response, mask = responses_of(policy)
    together = policy(query, query_mask, response, mask)
    for row, n in enumerate((5, 9)):
        alone_query = policy.tokenize(PROMPTS[row : row + 1])
        alone = policy(*alone_query, response[row : row + 1, :n], mask[row : row + 1, :n])
        for batch, single in zip(together, alone, strict=True):
            torch.testing.assert_close(batch[row, :n], single[0], atol=1e-5, rtol=1e-5)
            assert (batch[row, n:] == 0).all()


def test_a_prompt_longer_than_the_position_table_keeps_its_instruction_and_its_end(policy):
    text = prompt_text(" User: " + "well " * 3000)
    ids, mask = policy.tokenize([text])
    assert ids.shape == (1, policy.model.config.max_position_embeddings - 128) and mask.all()
    kept = policy.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert kept.startswith(INSTRUCTION) and kept.endswith("well  AI:")


def test_log_probabilities_are_those_of_the_whole_model(policy):
    query, query_mask = policy.tokenize(PROMPTS[:1])
    response, mask = responses_of(policy)
    response, mask = response[1:], mask[1:]
    logits = policy.model(input_ids=torch.cat([query, response], dim=1)).logits[:, query.shape[1] - 1 : -1]
    expected = torch.distributions.Categorical(logits=logits)
    logprobs, _, entropies = policy(query, query_mask, response, mask)
    torch.testing.assert_close(logprobs, expected.log_prob(response), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, expected.entropy(), atol=1e-5, rtol=1e-5)


def test_logits_in_chunks_are_the_same(policy, monkeypatch):
    inputs = (*policy.tokenize(PROMPTS), *responses_of(policy))
    whole = policy(*inputs)
    monkeypatch.setattr(models, "LOGITS_PER_CHUNK", 3 * policy.model.config.vocab_size)
    for a, b in zip(whole, policy(*inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_with_its_adapter_off_the_policy_is_the_base_model(policy, tiny):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny / "llama")
    query, _ = policy.tokenize(PROMPTS[:1])
    saved = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    try:
        with torch.no_grad():
            for p in policy.trainable():
                p.add_(0.05)
            expected = base(input_ids=query).logits
            assert not torch.allclose(policy.model(input_ids=query).logits, expected)
            with policy.reference():
                assert torch.equal(policy.model(input_ids=query).logits, expected)
    finally:
        policy.load_state_dict(saved, strict=False)


def test_a_saved_policy_loads_with_peft_and_with_us(policy, tiny, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with torch.no_grad():
        for p in policy.trainable():
            p.add_(0.01)
    policy.save(tmp_path / "GELI_llama_10")
    query, _ = policy.tokenize(PROMPTS[:1])
    expected = policy.model(input_ids=query).logits
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny / "llama"), tmp_path / "GELI_llama_10")
    torch.testing.assert_close(loaded.eval()(input_ids=query).logits, expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "GELI_llama_10")(PROMPTS[0]) == policy.tokenizer(PROMPTS[0])
    fresh = load_policy(str(tiny / "llama"), 4, 8, torch.float32)
    fresh.load(tmp_path / "GELI_llama_10")
    inputs = (*policy.tokenize(PROMPTS), *responses_of(policy))
    for a, b in zip(policy(*inputs), fresh(*inputs), strict=True):
        torch.testing.assert_close(a, b)


def spell(rows: list[list[int]]) -> list[str]:
    """A tokenizer of one letter a token; 0 is the end token."""
    return ["".join(chr(token) for token in row if token) for row in rows]


@pytest.mark.parametrize(
    ("response", "kept", "text"),
    [
        (" hello", 6, "hello"),
        (" hello\0\0\0", 7, "hello"),  # the end token is kept: ending was the policy's choice
        (" hello User: more", 7, "hello"),
        (" hi AI: AI:", 4, "hi"),
        (" a\0b User:", 3, "a"),
        ("User: me", 1, ""),  # empty: its first token carries the score
        ("\0", 1, ""),
        (" a User", 7, "a User"),  # no marker without its colon
    ],
)
def test_responses_are_cut_at_the_end_token_or_the_next_speaker(response, kept, text):
    tokens = torch.tensor([[ord(c) for c in response], [ord("x")] * len(response)])
    assert [list(column) for column in cut_responses(tokens, spell, end=0)] == [
        [kept, len(response)],
        [text, "x" * len(response)],
    ]


def test_distinct_n_by_hand():
    assert distinct(["a b a", "a b"], 1) == pytest.approx(2 / 5)
    assert distinct(["a b a", "a b"], 2) == pytest.approx(2 / 3)  # ab, ba of ab, ba, ab
    assert distinct([""], 1) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Heads


def shape_of(kind) -> list[str]:
    def name(layer):
        if isinstance(layer, torch.nn.Linear):
            return f"{layer.in_features}>{layer.out_features}"
        return type(layer).__name__

    return [name(layer) for layer in RewardHead(head_config(head=kind)).layers]


def test_each_heads_layers():
    assert shape_of("default") == ["16>768", "ReLU", "768>128", "ReLU", "128>32", "ReLU", "32>1"]
    assert shape_of("hard_shrink") == [*shape_of("default"), "GELU"]
    norm = ["LayerNorm", "ReLU"]
    assert shape_of("batch_norm") == ["16>768", *norm, "768>128", *norm, "128>32", *norm, "32>1"]
    assert shape_of("small_model") == ["16>128", "ReLU", "128>32", "ReLU", "32>1"]
    assert shape_of("small_model_shrink") == ["16>128", "Dropout", "ReLU", "128>1", "Dropout", "Tanh"]
    assert shape_of("rudder") == ["RudderCells", "16>1", "Differences"]


@pytest.mark.parametrize("kind", models.HEADS)
def test_the_hidden_layer_of_a_head_is_what_its_last_linear_layer_sees(kind):
    head = RewardHead(head_config(head=kind)).eval()
    features = torch.randn(6, 16)
    rewards, hidden = head(features, with_hidden=True)
    last = [i for i, layer in enumerate(head.layers) if isinstance(layer, torch.nn.Linear)][-1]
    assert torch.equal(head.layers[last:](hidden), rewards) and torch.equal(rewards, head(features))


def test_rudders_rewards_sum_to_its_last_prediction_and_look_back_only():
    head = RewardHead(head_config(head="rudder", redist_type="RUDDER")).eval()
    assert head.sequential and not RewardHead(head_config()).sequential
    features = torch.randn(9, 16)
    predictions = head.layers[:2](features)
    assert head(features).sum().item() == pytest.approx(predictions[-1].item(), abs=1e-5)
    torch.testing.assert_close(head(features[:4]), head(features)[:4])
    both = torch.stack([features, torch.randn(9, 16)])  # several trajectories at once
    torch.testing.assert_close(head(both)[0], head(features))


# ---------------------------------------------------------------------------------------------------------------------
# Encoders of every architecture that an alias stands for

PAIR_FORMS = {
    "bart": "<s>{}</s></s>{}</s>",
    "longformer": "<s>{}</s></s>{}</s>",
    "longt5": "{}</s>{}</s>",
    "llama-encoder": "<s>{}<s>{}</s>",  # its tokenizer puts no end token: one is added
}


@pytest.fixture(scope="module", params=PAIR_FORMS)
def architecture(request, sample, tmp_path_factory):
    """(kind, its encoder)"""
    folder = small_model(request.param, tmp_path_factory.mktemp("small") / request.param, sample)
    adapt = request.param == "llama-encoder"
    torch.manual_seed(0)
    return request.param, load_encoder(str(folder), adapt=adapt).eval()


TURN = (" User: what do you enjoy the most about cooking?", "AI: I read that it has changed a lot")


def test_every_architecture_gets_its_own_pair_form(architecture):
    kind, encoder = architecture
    pair = encoder.tokenize([TURN])[0]
    assert encoder.tokenizer.decode(pair.ids) == PAIR_FORMS[kind].format(*TURN)
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


def test_gradients_in_batches_are_those_of_one_batch(architecture):
    _, encoder = architecture
    pairs = encoder.tokenize([TURN, (TURN[0] * 4, TURN[1]), ("", "AI: hm")])
    gradients = []
    for tokens in (1, None):
        encoder.tokens_per_batch = tokens
        encoder.zero_grad()
        features = encoder.encode_with_gradients(pairs)
        torch.testing.assert_close(features, encoder.encode(pairs), atol=2e-5, rtol=1e-4)
        (features * torch.arange(3.0)[:, None]).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in encoder.trainable() if p.grad is not None]))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Policies of every architecture that an alias stands for


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5", "t5-tied", "blenderbot"])
def any_policy(request, sample, tmp_path_factory):
    """A policy whose adapter has been changed, so that it differs from its reference."""
    folder = small_model(request.param, tmp_path_factory.mktemp("policy") / request.param, sample)
    policy = load_policy(str(folder), 4, 8, torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.trainable():
            p.add_(0.1 * torch.randn_like(p))
    return policy


def whole_models_logits(policy, query, query_mask, response):
    if policy.has_encoder:
        start = torch.full((len(response), 1), policy.model.config.decoder_start_token_id)
        inputs = torch.cat([start, response[:, :-1]], dim=1)
        return policy.model(input_ids=query, attention_mask=query_mask, decoder_input_ids=inputs).logits
    ids = torch.cat([query, response], dim=1)
    return policy.model(input_ids=ids).logits[:, query.shape[1] - 1 : -1]


def test_every_policys_log_probabilities_are_those_of_the_whole_model_alone_and_in_a_batch(any_policy):
    query, query_mask = any_policy.tokenize(PROMPTS)
    response, mask = responses_of(any_policy)
    together = any_policy(query, query_mask, response, mask)
    for row, n in enumerate((5, 9)):
        alone = any_policy.tokenize(PROMPTS[row : row + 1])
        part = response[row : row + 1, :n]
        expected = torch.distributions.Categorical(logits=whole_models_logits(any_policy, *alone, part))
        torch.testing.assert_close(together[0][row, :n], expected.log_prob(part)[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together[2][row, :n], expected.entropy()[0], atol=1e-5, rtol=1e-5)
        values = any_policy(*alone, part, torch.ones(1, n))[1]
        torch.testing.assert_close(together[1][row, :n], values[0], atol=1e-5, rtol=1e-5)


def test_every_policys_samples_have_the_probabilities_that_it_says(any_policy):
    """The first token's frequencies over many samples agree with the log-probabilities of the forward pass."""
    query, query_mask = any_policy.tokenize(PROMPTS[:1] * 2000)
    torch.manual_seed(0)
    first = any_policy.generate(query, query_mask, torch.rand(2000, 1))[0][:, 0]
    tokens = torch.arange(any_policy.model.config.vocab_size)[:, None]
    alone = [x.expand(len(tokens), -1) for x in any_policy.tokenize(PROMPTS[:1])]
    with torch.no_grad():
        p = any_policy(*alone, tokens, torch.ones_like(tokens).float())[0][:, 0].exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-4)
    counts = torch.bincount(first, minlength=len(p))
    assert ((counts - 2000 * p).abs() < 6 * (2000 * p).sqrt() + 3).all()


def test_every_policys_reference_is_the_base_model_and_its_adapter_survives_saving(any_policy, tmp_path):
    from peft import PeftModel

    base_path = any_policy.model.peft_config["default"].base_model_name_or_path
    kind = type(any_policy.model.get_base_model())
    inputs = (*any_policy.tokenize(PROMPTS), *responses_of(any_policy))
    with torch.no_grad(), any_policy.reference():
        reference = any_policy(*inputs)[0]
    untouched = load_policy(base_path, 4, 8, torch.float32)
    torch.testing.assert_close(untouched(*inputs)[0], reference)
    assert not torch.allclose(any_policy(*inputs)[0], reference)
    any_policy.save(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(kind.from_pretrained(base_path), tmp_path / "adapter").eval()
    again = models.Policy(loaded, any_policy.tokenizer)
    torch.testing.assert_close(again(*inputs)[0], any_policy(*inputs)[0])


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused(any_policy, monkeypatch):
    kind = type(any_policy.model.get_base_model())
    whole = kind.forward

    def scaled(self, *args, **kwargs):
        output = whole(self, *args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits * 3)
        return output

    monkeypatch.setattr(kind, "forward", scaled)
    with pytest.raises(UserError, match="changes its logits"):
        any_policy._check_logits()
