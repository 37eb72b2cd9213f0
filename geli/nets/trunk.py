"""The frozen lower layers of a model, whose states are computed once for several passes through the layers above."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel


class _Reached(Exception):
    """Ends a forward pass at the top layers."""


class Trunk:
    """Splits the forward pass of a model below its top layers.

    The trunk's states do not depend on what trains in the top layers, so they are computed once for every pass.

    Args:
        body: a model that passes states through its layers one after the other, as Llama, BERT and BART's encoder do.
        n_top: how many layers are not part of the trunk. arguments: of every forward pass.

    Attributes:
        layers: the top layers.

    Raises:
        ValueError: if it is of another shape.
    """

    def __init__(self, body: PreTrainedModel, n_top: int, **arguments):
        self._body, self._arguments = body, arguments
        n = getattr(body.config, "num_hidden_layers", 0)
        lists = (module for module in body.modules() if isinstance(module, nn.ModuleList) and len(module) == n)
        layers = next(lists, ())
        if not 1 <= n_top <= len(layers):
            raise ValueError(f"expected a model with a list of at least {n_top} layers")
        kinds = getattr(body.config, "layer_types", None) or []  # a layer gets its mask by its place in this list
        if kinds[:n_top] != kinds[-n_top:]:
            raise ValueError("its layers have attention of several kinds")
        self.layers = layers[n - n_top :]
        self._owner = next(module for module in body.modules() if layers in module.children())
        self._name = next(name for name, child in self._owner.named_children() if child is layers)
        ids = torch.arange(8, device=body.device)[None]
        try:
            with torch.no_grad():
                whole, split = body(input_ids=ids, **arguments)[0], self.top(self(input_ids=ids), input_ids=ids)
            same = torch.allclose(whole.float(), split.float(), atol=1e-3, rtol=1e-2)
        except (AttributeError, LookupError, TypeError, RuntimeError):  # architectures differ in any way
            same = False
        if not same:
            raise ValueError("its forward pass is more than its layers, one after the other")

    def __call__(self, **inputs) -> torch.Tensor:
        """(n, m, hidden) states below the top layers. `inputs` are those of the model's forward pass."""
        with torch.no_grad(), self.record(stop=True) as states:
            self._body(**inputs, **self._arguments)
        return states[0]

    @contextmanager
    def record(self, stop: bool = False) -> Iterator[list[torch.Tensor]]:
        """Collects the states (n, m, hidden) that reach the top layers in the model's forward passes, in their order.
        With `stop`, the first pass ends there."""
        found: list[torch.Tensor] = []

        def keep(_, args: tuple, kwargs: dict) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            if stop:
                raise _Reached

        hook = self.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield found
        except _Reached:
            pass
        finally:
            hook.remove()

    def top(self, states: torch.Tensor, **inputs) -> torch.Tensor:
        """(n, m, hidden) last states of the model, from the states (n, m, hidden) below its top layers. `inputs` are
        those of the model's forward pass: `inputs_embeds=states` do in place of token ids."""

        def put(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            more = (args[0] if args else kwargs["hidden_states"]).shape[1] - states.shape[1]
            padded = nn.functional.pad(states, (0, 0, 0, more))  # as Longformer pads its input
            return ((padded, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": padded})

        hook, layers = self.layers[0].register_forward_pre_hook(put, with_kwargs=True), getattr(self._owner, self._name)
        setattr(self._owner, self._name, self.layers)
        try:
            return self._body(**inputs, **self._arguments).last_hidden_state
        finally:
            setattr(self._owner, self._name, layers)
            hook.remove()
