"""Decoding: reading prompts of different lengths, and the cache of keys and values."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from geli.nets import batching
from geli.nets.decoding import CausalDecoder, left_aligned

SHAPE = dict(
    vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
LENGTHS = (3, 12, 5, 7, 1)


def model_of(kind: str):
    torch.manual_seed(0)
    if kind == "mistral":  # attends to a window of tokens
        return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)).eval()
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def prompts():
    ids = torch.randint(1, 50, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]).long()
    return ids * mask, mask


def test_left_aligned_rows_by_hand():
    ids = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
    assert left_aligned(ids, torch.tensor([2, 0])).tolist() == [[5, 6, 0, 0], [1, 2, 3, 4]]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("tokens_at_once", [1, 14, 1000])
def test_each_row_s_states_are_those_of_its_whole_text_read_alone(kind, together, tokens_at_once, monkeypatch):
    monkeypatch.setattr(batching, "CPU_TOKENS", tokens_at_once)
    model, (ids, mask) = model_of(kind), prompts()
    new = torch.randint(1, 50, (len(LENGTHS), 6), generator=torch.Generator().manual_seed(2))
    decoder = CausalDecoder(model, ids, mask, room=6, together=together)
    states = [decoder.state]
    for step in range(6):
        decoder.read(new[:, step])
        states.append(decoder.state)
    for row, length in enumerate(LENGTHS):
        text = torch.cat([ids[row, -length:], new[row]])[None]
        expected = model.model(input_ids=text).last_hidden_state[0, length - 1 :]
        torch.testing.assert_close(torch.stack(states)[:, row], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_roomy_layers_hold_what_the_library_s_own_do():
    model, (ids, mask) = model_of("llama"), prompts()
    decoder = CausalDecoder(model, ids, mask, room=2, together=True)
    decoder.read(ids[:, -1])
    decoder.read(ids[:, -2])
    cache, positions = DynamicCache(config=model.config), (mask.cumsum(dim=1) - 1).clamp(min=0)
    for inputs in (ids, ids[:, -1:], ids[:, -2:-1]):
        model.model(input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache)
        mask, positions = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1), positions[:, -1:] + 1
    for ours, theirs in zip(decoder._cache.layers, cache.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
