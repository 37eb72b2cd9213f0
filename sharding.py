"""Models whose layers are spread over the processes of a run: FSDP, or what a DeepSpeed ZeRO file asks for."""

import os
from collections.abc import Sequence
from functools import partial

from cli import UserError


def _is_set(variable: str) -> bool:
    """Whether `accelerate launch` set this to true."""
    return os.environ.get(variable, "false").lower() == "true"


def check_spreading() -> None:
    """Reads how `accelerate launch` was configured to spread models, before accelerate does.

    A DeepSpeed configuration is taken as what it asks for: weights, gradients and optimizer states in 1/n at each
    process, and with ZeRO 3 weights that are gathered a layer at a time. `spread` does that, DeepSpeed is not run.
    """
    if _is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("accelerate is configured for Megatron-LM: expected FSDP, DeepSpeed or whole copies")
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "none")
        moved = {
            os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none") for what in ("PARAM", "OPTIMIZER")
        }
        if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ or stage not in ("0", "1", "2", "3") or moved != {"none"}:
            raise UserError(
                f"accelerate is configured for DeepSpeed: expected zero_stage from 0 to 3 in accelerate's own file, no "
                f"deepspeed_config_file and nothing offloaded, found zero_stage {stage}, offloaded to "
                f"{', '.join(sorted(moved))}; see accelerate_configs/deepspeed_zero3.yaml"
            )
        os.environ.update(ACCELERATE_USE_DEEPSPEED="false", ACCELERATE_USE_FSDP=str(stage != "0").lower())
        os.environ.update(FSDP_VERSION="2", FSDP_RESHARD_AFTER_FORWARD=str(stage == "3").lower())
    if not _is_set("ACCELERATE_USE_FSDP"):
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2" or _is_set("FSDP_OFFLOAD_PARAMS") or _is_set("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError(
            f"accelerate is configured for FSDP: expected fsdp_version 2 without fsdp_offload_params and "
            f"fsdp_activation_checkpointing, found version {version}; see accelerate_configs/fsdp.yaml"
        )
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # else transformers reads no weights but in one process


def spread(owner, accelerator):
    """Puts `owner`, a module whose `model` is a transformer, on the device: whole, or, where `accelerate launch` was
    configured for FSDP, with the weights of the model's layers spread over the processes (torch's `fully_shard`, with
    the settings of accelerate's plugin) and gathered a layer at a time where they are needed.

    Embeddings, norms and heads outside the layers stay whole, and so do the weights of a LoRA adapter. Gradients of
    what is spread are sums over the processes when the backward pass is over; `sum_gradients` adds up the others.

    Every forward and backward pass through spread layers is one that all processes make together. `owner.agree` is then
    set: the largest of the numbers that the processes call it with, by which they know how many passes to make.

    Raises:
        UserError: if the model has no layers that are known as such.
    """
    if not _is_set("ACCELERATE_USE_FSDP") or accelerator.num_processes == 1:
        return owner.to(accelerator.device)
    from accelerate import FullyShardedDataParallelPlugin
    from peft import PeftModel
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, device = owner.model, accelerator.device
    total = sum(p.numel() for p in model.parameters())
    plugin = FullyShardedDataParallelPlugin()  # reads the environment; on a CPU accelerate itself makes none
    settings = {
        "mesh": init_device_mesh(device.type, (accelerator.num_processes,)),
        "reshard_after_forward": plugin.reshard_after_forward,
    }
    layers = _layers(model, plugin.transformer_cls_names_to_wrap)
    if not layers:
        raise UserError(
            f"accelerate is configured for FSDP: found no layers to spread in {type(model).__name__}; name their class "
            "in its file as fsdp_transformer_layer_cls_to_wrap, with fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"
        )
    whole = {p for p in model.parameters() if p.requires_grad} if isinstance(model, PeftModel) else set()
    for layer, _ in layers:
        if not whole:
            layer.register_forward_hook(_use_all_weights)
        fully_shard(layer, ignored_params=whole, **settings)
        layer.set_gradient_divide_factor(1.0)  # our losses are parts of a sum
        layer.set_force_sum_reduction_for_comms(True)  # which gloo can do as well
    for stack in dict.fromkeys(stack for _, stack in layers):  # gathers a layer while the one before it computes
        fully_shard(stack, ignored_params={p for p in stack.parameters() if not is_spread(p)}, **settings)
    for tensor in (*owner.parameters(), *owner.buffers()):
        if not is_spread(tensor):
            tensor.data = tensor.data.to(device)
    owner.agree = partial(_largest, device=device)
    mine = sum(p.to_local().numel() if is_spread(p) else p.numel() for p in model.parameters())
    print(
        f"FSDP: of {total:,} weights each of {accelerator.num_processes} processes holds {mine:,} "
        f"({len(layers)} layers are spread)"
    )
    return owner


def _layers(model, names: Sequence[str] | None) -> list[tuple]:
    """The layers of a transformer, each with the module that runs them one after another: modules of the classes
    `names`, else what is in its outermost module lists."""
    from torch import nn

    modules, found = dict(model.named_modules()), {}
    for path, module in modules.items():
        above = path.rpartition(".")[0]
        named = type(module).__name__ in names if names else isinstance(modules.get(above), nn.ModuleList)
        if not named or any(path.startswith(f"{outer}.") for outer in found):
            continue
        while isinstance(modules[above], nn.ModuleList):
            above = above.rpartition(".")[0]
        found[path] = (module, modules[above])
    return list(found.values())


def _use_all_weights(layer, inputs, output):
    """Forward hook of a layer: gives every weight that trains a gradient, if a zero. Which get one else depends on the
    input in some models (LongT5's, on its length), and the processes then add up gradients of different sizes."""
    import torch

    trained = [p.flatten()[0] for p in layer.parameters() if p.requires_grad]
    if not trained or not torch.is_grad_enabled():
        return output
    first, *others = output if isinstance(output, tuple) else (output,)
    first = first + 0 * torch.stack([p.to(first.dtype) for p in trained]).sum()
    return (first, *others) if isinstance(output, tuple) else first


def _largest(n: int, device) -> int:
    """The largest of all processes' n."""
    import torch

    number = torch.tensor(n, device=device)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return int(number)


def is_spread(tensor) -> bool:
    """Whether each process holds a part of it."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def reshard(model) -> None:
    """Gives up what a forward pass without a backward pass may have left gathered."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def spread_like(parameter, tensor):
    """A whole tensor, the same in all processes, spread as `parameter` is."""
    from torch.distributed.tensor import distribute_tensor

    if not is_spread(parameter):
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def whole_tensor(tensor):
    """A tensor whole, if it is spread; all processes ask for it together."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def whole_state(model) -> dict:
    """The state of a model that `spread` may have spread, whole and on the CPU; all processes ask for it together."""
    reshard(model)
    state = model.state_dict()
    return {name: whole_tensor(t).cpu() for name, t in state.items()}
