"""Decoding: a language model reads prompts once, and then one new token of every response at a time."""

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from geli.nets.batching import grouped_by_length


def left_aligned(ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """(n, width) token ids whose first `padding` (n,) columns are moved to the right end of their row.

    In a causal model nothing sees what is to its right, so rows that begin in column 0 need no attention mask.
    """
    columns = torch.arange(ids.shape[1], device=ids.device)
    return ids.gather(1, (columns + padding[:, None]) % ids.shape[1])


class CausalDecoder:
    """Decodes with a causal model.

    Args:
        model: the language model. query, query_mask: (n, Q) prompts, padded on the left. room: most new tokens.
        together: read all prompts in one forward pass, as a sharded model must. Otherwise prompts of similar lengths
            are read together, without the padding that the longest prompt causes.
        copies: how many times in a row each prompt stands in `query`; it is then read once.

    Attributes:
        state: (n, hidden) the last hidden state of each row, from which its next token is predicted.
    """

    def __init__(
        self, model: PreTrainedModel, query: torch.Tensor, query_mask: torch.Tensor, room: int, together: bool,
        copies: int = 1,
    ):  # fmt: skip
        self._body = getattr(model, model.base_model_prefix)
        self._mask, self._positions = query_mask, (query_mask.cumsum(dim=1) - 1).clamp(min=0)
        self._prompts: list[torch.Tensor] = []  # (m, copies) the rows of the batch that each pass through prompts read
        self._cache = DynamicCache(config=model.config)
        plain = all(type(layer) is DynamicLayer for layer in self._cache.layers)  # not those of sliding windows
        self._cache.layers = [_RoomyLayer(room) if plain else layer for layer in self._cache.layers]
        if together or not plain:
            self._read(query)
        else:
            self._read_by_length(query, query_mask, copies)

    def _read(self, ids: torch.Tensor) -> None:
        """Reads (n, m) more tokens of every row."""
        output = self._body(
            input_ids=ids, attention_mask=self._mask, position_ids=self._positions, past_key_values=self._cache,
            use_cache=True,
        )  # fmt: skip
        self.state = output.last_hidden_state[:, -1]

    def _read_by_length(self, query: torch.Tensor, query_mask: torch.Tensor, copies: int) -> None:
        """Reads the prompts in groups of similar lengths, and moves their keys and values to the places where a batch
        that is padded on the left has them."""
        lengths, device, states = query_mask[::copies].sum(dim=1), query.device, []
        aligned = left_aligned(query[::copies], query.shape[1] - lengths)
        places = torch.arange(len(query), device=device).view(-1, copies)
        for rows in grouped_by_length(lengths.cpu().numpy(), device):
            chosen = torch.as_tensor(rows, device=device)
            output = self._body(
                input_ids=aligned[chosen, : int(lengths[chosen].max())],
                past_key_values=DynamicCache(config=self._body.config),
                use_cache=True,
            )
            states.append(output.last_hidden_state[torch.arange(len(rows), device=device), lengths[chosen] - 1])
            for layer, read in zip(self._cache.layers, output.past_key_values.layers, strict=True):
                layer.place(read.keys, read.values, places[chosen], lengths[chosen].tolist(), query.shape)
            self._prompts.append(places[chosen])
        self.state = torch.cat(states).repeat_interleave(copies, dim=0)[torch.cat(self._prompts).flatten().argsort()]

    def join(self, passes: list[torch.Tensor]) -> torch.Tensor | None:
        """What `Trunk.record` collected of this decoder's passes as (n, Q + R, hidden), the states of each prompt and
        its response from column 0 on; None where prompts were read with padding on their left."""
        if not self._prompts:
            return None
        prompts, tokens = passes[: len(self._prompts)], passes[len(self._prompts) :]
        lengths = self._mask.sum(dim=1) - len(tokens)
        joined = prompts[0].new_zeros(len(lengths), self._mask.shape[1] + 1, prompts[0].shape[2])  # the last token: 0
        for places, states in zip(self._prompts, prompts, strict=True):
            joined[places, : states.shape[1]] = states[:, None]
        for i, states in enumerate(tokens):
            joined[torch.arange(len(joined), device=joined.device), lengths + i] = states[:, 0]
        return joined

    def read(self, tokens: torch.Tensor) -> None:
        """Reads the next token (n,) of every row."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        self._positions = self._positions[:, -1:] + 1
        self._read(tokens[:, None])


class EncoderDecoder:
    """Decodes with an encoder-decoder, whose encoder reads the prompts. As `CausalDecoder`, with prompts padded on the
    right."""

    def __init__(self, model: PreTrainedModel, query: torch.Tensor, query_mask: torch.Tensor):
        self._decoder, self._mask, self._cache = model.get_decoder(), query_mask, None
        self._encoded = model.get_encoder()(input_ids=query, attention_mask=query_mask).last_hidden_state
        self.read(torch.full_like(query[:, 0], model.config.decoder_start_token_id))

    def read(self, tokens: torch.Tensor) -> None:
        """Reads the next token (n,) of every row."""
        output = self._decoder(
            input_ids=tokens[:, None], encoder_hidden_states=self._encoded, encoder_attention_mask=self._mask,
            past_key_values=self._cache, use_cache=True,
        )  # fmt: skip
        self._cache, self.state = output.past_key_values, output.last_hidden_state[:, -1]


# Measured (small Llama, CPU): DynamicCache takes 5% longer; StaticCache takes as long, but its states are not the same.
class _RoomyLayer(DynamicLayer):
    """Keys and values of one layer, in memory allocated once. `DynamicLayer` copies them all for every new token.

    Args:
        room: tokens after the prompt.
    """

    def __init__(self, room: int):
        super().__init__()
        self._room = room

    def _allocate(self, keys: torch.Tensor, values: torch.Tensor, n: int, length: int) -> None:
        self.lazy_initialization(keys, values)
        self._all = [new.new_zeros(n, new.shape[1], length + self._room, new.shape[3]) for new in (keys, values)]

    def place(self, keys, values, places: torch.Tensor, lengths: list[int], shape: tuple[int, int]) -> None:
        """Stores keys and values (m, heads, tokens, width) of m prompts, which begin in column 0 and have `lengths`
        tokens, at the right ends of their rows, `places` (m, copies), of the (n, Q) `shape` of all prompts."""
        if not self.is_initialized:
            self._allocate(keys, values, *shape)
        for buffer, new in zip(self._all, (keys, values), strict=True):
            for i, (rows, length) in enumerate(zip(places, lengths, strict=True)):
                buffer[rows, :, shape[1] - length : shape[1]] = new[i, :, :length]
        self.keys, self.values = (buffer[..., : shape[1], :] for buffer in self._all)

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values (n, heads, tokens, width); returns all so far."""
        start, end = self.get_seq_length(), self.get_seq_length() + keys.shape[-2]
        if not self.is_initialized:
            self._allocate(keys, values, len(keys), end)
        for buffer, new in zip(self._all, (keys, values), strict=True):
            buffer[..., start:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._all)
        return self.keys, self.values
