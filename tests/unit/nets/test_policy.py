"""The policy: probabilities, sampling, the reference policy, saving."""

import pytest
import torch
from conftest import small_model

from geli.data.messages import INSTRUCTION
from geli.nets import policy as policy_module
from geli.nets.options import Adapter, PolicyOptions
from geli.nets.policy import Policy, load_policy
from geli.nets.prompts import Prompt
from geli.rl.rollout import rollout
from geli.run.errors import UserError


@pytest.fixture(scope="module")
def policy(tiny):
    torch.manual_seed(0)
    return load_policy(str(tiny / "llama"), Adapter(4, 8), torch.float32)


TEXTS = ("You are AI. User: hi AI:", " User: what a long and winding question that is, is it not? AI:")
PROMPTS = [Prompt(text, "", "") for text in TEXTS]


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
    text = f"{INSTRUCTION} User: {'well ' * 3000} AI:"
    ids, mask = policy.tokenize([Prompt(text, "", "")])
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


def test_a_comparison_of_distributions_is_that_of_the_whole_models(policy):
    query, query_mask = policy.tokenize(PROMPTS)
    response, mask = responses_of(policy)
    hidden = policy.states(query, query_mask, response, mask)
    other = hidden + torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    ours, theirs = (torch.distributions.Categorical(logits=policy._logits(states)) for states in (hidden, other))
    logprobs, _, _, others, kl = policy.logprobs_from_hidden(hidden, response, mask, other)
    torch.testing.assert_close(logprobs, ours.log_prob(response) * mask, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(others, theirs.log_prob(response) * mask, atol=1e-5, rtol=1e-5)
    assert kl[1].min() > 1e-3 and (kl[0, 5:] == 0).all()
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(ours, theirs) * mask, atol=1e-5, rtol=1e-5)


def test_logits_in_chunks_are_the_same(policy, monkeypatch):
    inputs = (*policy.tokenize(PROMPTS), *responses_of(policy))
    whole = policy(*inputs)
    monkeypatch.setattr(policy_module, "LOGITS_PER_CHUNK", 3 * policy.model.config.vocab_size)
    for a, b in zip(whole, policy(*inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_the_top_layers_alone_can_be_adapted(tiny):
    policy = load_policy(str(tiny / "llama"), Adapter(4, 8, 1), torch.float32)
    top = policy.model.config.num_hidden_layers - 1
    names = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 7 and all(f".layers.{top}." in name for name in names)


def test_the_trunk_and_the_top_layers_are_the_whole_pass(tiny):
    policy = load_policy(str(tiny / "llama"), Adapter(4, 8, 2), torch.float32)
    with torch.no_grad():
        [p.add_(0.1) for p in policy.trainable()]
    inputs = (*policy.tokenize(PROMPTS), *responses_of(policy))
    whole, trunk = policy.states(*inputs), policy.trunk(*inputs)
    torch.testing.assert_close(policy.states(*inputs, trunk), whole, atol=1e-5, rtol=1e-5)
    with policy.reference():
        assert (policy.states(*inputs, trunk) - whole).abs().max() > 1e-2
    assert not trunk.requires_grad


@pytest.mark.parametrize("copies", [1, 2])
def test_sampling_finds_the_states_of_the_trunk(copies, tiny):
    policy = load_policy(str(tiny / "llama"), Adapter(4, 8, 2), torch.float32)
    with torch.no_grad():
        [p.add_(0.1) for p in policy.trainable()]
    prompts = [prompt for prompt in PROMPTS for _ in range(copies)]
    uniforms = torch.rand(len(prompts), 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = rollout(policy, prompts, uniforms, copies)
    trunk = policy.trunk(found.query, found.query_mask, found.response, found.mask)
    assert len(set(found.lengths)) > 1 and found.trunk.shape[1] >= trunk.shape[1]
    for length, whole, sampled in zip(found.lengths, trunk, found.trunk, strict=True):  # the last token was not read
        torch.testing.assert_close(sampled[: length - 1], whole[: length - 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "layers", "says"),
    [("llama", 9, "a list of at least 9 layers"), ("gpt2", 1, "made as Llama's"), ("t5", 1, "without an encoder")],
)
def test_models_of_another_shape_have_no_top_layers(kind, layers, says, tmp_path, sample):
    folder = small_model(kind, tmp_path / kind, sample)
    with pytest.raises(UserError, match=f"--num_layers_unfrozen {layers} .*{says}.*; found one of .* {kind}: give 0"):
        load_policy(str(folder), Adapter(4, 8, layers), torch.float32)


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
    assert AutoTokenizer.from_pretrained(tmp_path / "GELI_llama_10")(TEXTS[0]) == policy.tokenizer(TEXTS[0])
    fresh = load_policy(str(tiny / "llama"), Adapter(4, 8), torch.float32)
    fresh.load(tmp_path / "GELI_llama_10")
    inputs = (*policy.tokenize(PROMPTS), *responses_of(policy))
    for a, b in zip(policy(*inputs), fresh(*inputs), strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Policies of every architecture that an alias stands for


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5", "t5-tied", "blenderbot"])
def any_policy(request, sample, tmp_path_factory):
    """A policy whose adapter has been changed, so that it differs from its reference."""
    folder = small_model(request.param, tmp_path_factory.mktemp("policy") / request.param, sample)
    policy = load_policy(str(folder), Adapter(4, 8), torch.float32)
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
    untouched = load_policy(base_path, Adapter(4, 8), torch.float32)
    torch.testing.assert_close(untouched(*inputs)[0], reference)
    assert not torch.allclose(any_policy(*inputs)[0], reference)
    any_policy.save(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(kind.from_pretrained(base_path), tmp_path / "adapter").eval()
    again = Policy(loaded, any_policy.tokenizer)
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


def test_generation_does_not_depend_on_the_batch_and_gives_the_states_of_the_forward_pass(any_policy):
    query, mask = any_policy.tokenize(PROMPTS)
    uniforms = torch.rand(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together, states, _ = any_policy.generate(query, mask, uniforms)
    kept = (torch.cumsum(together == any_policy.end, dim=1) - (together == any_policy.end).int() == 0).float()
    found = any_policy.logprobs_from_hidden(states, together, kept)
    for a, b in zip(found, any_policy(query, mask, together, kept), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    for row in range(2):
        alone = any_policy.generate(*any_policy.tokenize(PROMPTS[row : row + 1]), uniforms[row : row + 1])[0][0]
        n = int(kept[row].sum())
        assert alone[:n].tolist() == together[row, :n].tolist()


def test_responses_that_are_done_stop_the_generation(policy):
    query, mask = policy.tokenize(PROMPTS)
    seen = []

    def done(response):
        seen.append(response.shape[1])
        return torch.ones(len(response), dtype=torch.bool)

    response, *_ = policy.generate(query, mask, torch.full((2, 20), 0.4), done)
    assert seen == [4] and response.shape == (2, 4)
    policy.is_sharded, policy.largest = True, lambda unfinished: 1  # another process has responses to continue
    try:
        response, *_ = policy.generate(query, mask, torch.full((2, 20), 0.4), done)
    finally:
        policy.is_sharded, policy.largest = False, int
    assert response.shape == (2, 20) and (response[:, 4:] == policy.pad).all()


def test_no_responses_are_a_pass_all_the_same(any_policy):
    query, mask = any_policy.tokenize(PROMPTS)
    response, kept = responses_of(any_policy)
    assert [x.shape for x in any_policy(query[:0], mask[:0], response[:0], kept[:0])] == [(0, 9)] * 3


def test_the_option_that_names_the_policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert PolicyOptions().source() == "huggyllama/llama-7b"
    (tmp_path / "llama_hf").mkdir()
    assert PolicyOptions().source() == "./llama_hf"
    assert PolicyOptions(model_name="cosmo").source() == "allenai/cosmo-xl"
    assert PolicyOptions(model_name="smollm2").source(tmp_path) == str(tmp_path / "smollm2")
    with pytest.raises(UserError, match="smollm2 is kept in the cache, which --no_cache turns off"):
        PolicyOptions(model_name="smollm2").source()
    assert PolicyOptions(model_name="org/name").source() == "org/name"
    assert PolicyOptions().adapter == (16, 32, 0, None) and PolicyOptions(no_accel=True).adapter[:2] == (24, 48)
    chosen = PolicyOptions(lora_r=4, lora_alpha=8, num_layers_unfrozen=2, lora_target_modules=["o_proj"])
    assert chosen.adapter == (4, 8, 2, ("o_proj",))
