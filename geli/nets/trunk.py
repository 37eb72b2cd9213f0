"""The frozen trunk below a model's adapted layers, which policy, reference and update share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel


class Trunk:
    """Splits the forward pass of a Llama-shaped model below its top layers.

    The trunk's states do not depend on an adapter in the top layers, so they are computed once for every pass.

    Args:
        body: a model of token embeddings, `layers` and a last `norm`, as Llama, Mistral or Qwen are. n_top: how many
            layers are not part of the trunk.

    Raises:
        ValueError: if it is of another shape.
    """

    def __init__(self, body: PreTrainedModel, n_top: int):
        layers, norm = getattr(body, "layers", None), getattr(body, "norm", None)
        if not (isinstance(layers, nn.ModuleList) and norm and n_top <= len(layers)):
            raise ValueError(f"expected a Llama-shaped model of at least {n_top} layers")
        self._body = body
        self._below, self._top = (layers[: len(layers) - n_top], nn.Identity()), (layers[len(layers) - n_top :], norm)
        ids = torch.arange(8, device=body.device)[None]
        with torch.no_grad():
            whole, split = body(input_ids=ids, use_cache=False).last_hidden_state, self.top(self(ids))
        if not torch.allclose(whole.float(), split.float(), atol=1e-3, rtol=1e-2):
            raise ValueError("its forward pass is more than its layers, one after the other")

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """(n, m, hidden) states below the top layers of token ids (n, m), whose rows begin in column 0."""
        with torch.no_grad(), self._only(*self._below):
            return self._body(input_ids=ids, use_cache=False).last_hidden_state

    def top(self, states: torch.Tensor) -> torch.Tensor:
        """(n, m, hidden) last states of the model, from the states (n, m, hidden) below its top layers."""
        with self._only(*self._top):
            return self._body(inputs_embeds=states, use_cache=False).last_hidden_state

    @contextmanager
    def _only(self, layers: nn.ModuleList, norm: nn.Module) -> Iterator[None]:
        body, before = self._body, (self._body.layers, self._body.norm)
        body.layers, body.norm = layers, norm
        try:
            yield
        finally:
            body.layers, body.norm = before
