"""Models whose layers are sharded over the processes of a run: FSDP, or what a DeepSpeed configuration asks for."""

import os
from collections.abc import Sequence
from functools import partial

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import nn

from geli.run.errors import UserError


def _is_set(variable: str) -> bool:
    """Whether `accelerate launch` set this environment variable to true."""
    return os.environ.get(variable, "false").lower() == "true"


def check_sharding() -> None:
    """Checks how `accelerate launch` was configured, before accelerate reads it.

    A DeepSpeed configuration is translated to FSDP 2, because DeepSpeed itself is not used: every process holds 1/n of
    the weights, gradients and optimizer states, and with ZeRO 3 also gathers weights one layer at a time. Refused are
    Megatron-LM, offloading, activation checkpointing, FSDP 1, and a `deepspeed_config_file`.
    """
    if _is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("accelerate is configured for Megatron-LM: expected FSDP, DeepSpeed or whole copies")
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "none")
        offloaded = {
            os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE", "none") for part in ("PARAM", "OPTIMIZER")
        }
        has_file = "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ
        if has_file or stage not in ("0", "1", "2", "3") or offloaded != {"none"}:
            raise UserError(
                f"accelerate is configured for DeepSpeed: expected zero_stage from 0 to 3 in accelerate's own file, no "
                f"deepspeed_config_file and no offloading, found zero_stage {stage}, offloading to "
                f"{', '.join(sorted(offloaded))}; see accelerate_configs/deepspeed_zero3.yaml"
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
    # otherwise transformers reads the weights in one process only
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def shard(owner: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Moves `owner`, a module whose `model` is a transformer, to the device, and shards the model's layers if
    `accelerate launch` was configured for FSDP (torch's `fully_shard` with the settings of accelerate's plugin).

    Embeddings, norms, heads outside the layers and LoRA weights stay whole. Gradients of sharded weights are summed
    over the processes by the backward pass, and those of whole weights by `sum_gradients`.

    All processes must make the same number of forward and backward passes through sharded layers. For that purpose
    `owner.is_sharded` is set, and `owner.largest`, a function that returns the largest of the numbers that the
    processes call it with (of an owner that is not sharded, the number itself).
    """
    if not _is_set("ACCELERATE_USE_FSDP") or accelerator.num_processes == 1:
        return owner.to(accelerator.device)
    from torch.distributed.device_mesh import init_device_mesh  # slow to import, and rarely used
    from torch.distributed.fsdp import fully_shard

    model, device = owner.model, accelerator.device
    total = sum(p.numel() for p in model.parameters())
    plugin = FullyShardedDataParallelPlugin()  # reads the environment; on a CPU accelerate itself creates none
    layers = _layers(model, plugin.transformer_cls_names_to_wrap)
    if not layers:
        raise UserError(
            f"accelerate is configured for FSDP: found no layers to shard in {type(model).__name__}; name their class "
            "in its file as fsdp_transformer_layer_cls_to_wrap, with fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"
        )
    settings = {
        "mesh": init_device_mesh(device.type, (accelerator.num_processes,)),
        "reshard_after_forward": plugin.reshard_after_forward,
    }
    adapted = getattr(model, "peft_config", None)
    whole = {p for p in model.parameters() if p.requires_grad} if adapted else set()
    for layer, _ in layers:
        if not whole:
            layer.register_forward_hook(_use_all_weights)
        fully_shard(layer, ignored_params=whole, **settings)
        layer.set_gradient_divide_factor(1.0)  # every process' loss is a part of a sum
        layer.set_force_sum_reduction_for_comms(True)  # supported by gloo too
    for stack in dict.fromkeys(stack for _, stack in layers):  # gathers a layer while the previous one computes
        fully_shard(stack, ignored_params={p for p in stack.parameters() if not is_part(p)}, **settings)
    for tensor in (*owner.parameters(), *owner.buffers()):
        if not is_part(tensor):
            tensor.data = tensor.data.to(device)
    owner.is_sharded, owner.largest = True, partial(_largest, device=device)
    held = sum(p.to_local().numel() if is_part(p) else p.numel() for p in model.parameters())
    print(
        f"FSDP: of {total:,} weights each of {accelerator.num_processes} processes holds {held:,} "
        f"({len(layers)} layers are sharded)"
    )
    return owner


def _layers(model: nn.Module, names: Sequence[str] | None) -> list[tuple[nn.Module, nn.Module]]:
    """The layers of a transformer, each with the module that runs them in order. A layer is a module of a class in
    `names`; without names, an entry of an outermost `ModuleList`."""
    modules, layers = dict(model.named_modules()), {}
    for path, module in modules.items():
        parent = path.rpartition(".")[0]
        is_layer = type(module).__name__ in names if names else isinstance(modules.get(parent), nn.ModuleList)
        if not is_layer or any(path.startswith(f"{outer}.") for outer in layers):
            continue
        while isinstance(modules[parent], nn.ModuleList):
            parent = parent.rpartition(".")[0]
        layers[path] = (module, modules[parent])
    return list(layers.values())


def _use_all_weights(layer, inputs, output):
    """Forward hook: gives every trained weight a gradient, if only zero. In some models (LongT5) which weights get one
    depends on the input's length, and processes would then sum gradients of different sizes."""
    trained = [p.flatten()[0] for p in layer.parameters() if p.requires_grad]
    if not trained or not torch.is_grad_enabled():
        return output
    first, *others = output if isinstance(output, tuple) else (output,)
    first = first + 0 * torch.stack([p.to(first.dtype) for p in trained]).sum()
    return (first, *others) if isinstance(output, tuple) else first


def _largest(n: int, device) -> int:
    number = torch.tensor(n, device=device)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return int(number)


def is_part(tensor: torch.Tensor) -> bool:
    """Whether each process holds only a part of the tensor (a `DTensor`, whose class takes seconds to import)."""
    return hasattr(tensor, "full_tensor")


def reshard(model: nn.Module) -> None:
    """Frees the weights that a forward pass without a backward pass left gathered."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state of a model, on the CPU. All processes must call it together."""
    reshard(model)
    state = model.state_dict().items()
    return {name: (tensor.full_tensor() if is_part(tensor) else tensor).cpu() for name, tensor in state}
