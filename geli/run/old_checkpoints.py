"""Reads checkpoints in the format "geli-state-1" (`step_*.safetensors`), so that older runs can be resumed."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from geli.run.errors import first_line

_FORMAT = "geli-state-1"


def read_old_checkpoint(path: Path, modules: list[str], parameters: list[str]) -> dict:
    """The content of an old checkpoint, converted to the structure of new ones.

    Args:
        path: of the file. modules: names of the run's modules. parameters: names (`{module}.{name}`) of the optimizer's
            parameters in its order, because the old format numbered them.

    Raises:
        ValueError, KeyError: if the file is damaged, or is not an old checkpoint.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(first_line(error)) from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"its format is not {_FORMAT}")
    if metadata["checksum"] != _checksum(tensors, metadata["tree"]):
        raise ValueError("its content is not what was written")
    checkpoint = _unpacked(json.loads(metadata["tree"]), tensors)
    values = checkpoint["values"]
    if "ppo" in values:  # stage 3 kept policy and optimizer in it
        values |= {name: values["ppo"].pop(name) for name in ("policy", "optimizer")}
        values["order"] = values.pop("ahead")
        values["recorder"]["warned"] = values["recorder"].pop("said")
    optimizer = values.pop("optimizer")
    if optimizer["state"]:
        optimizer["state"] = {parameters[i]: state for i, state in optimizer["state"].items()}
        for group in optimizer["param_groups"]:
            group["params"] = [parameters[i] for i in group["params"]]
    weights = {f"{module}.{name}": tensor for module in modules for name, tensor in values.pop(module).items()}
    return {
        "step": int(checkpoint["step"]),
        "modules": weights,
        "optimizer": optimizer,
        "values": values,
        "random": checkpoint["random"],
        "inputs": checkpoint["inputs"],
    }


def _checksum(tensors: dict[str, torch.Tensor], text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unpacked(tree, tensors: dict[str, torch.Tensor]):
    """The value that JSON describes: containers are one-entry objects named after their type, tensors are numbered."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind in ("tensor", "array"):
        return tensors[content] if kind == "tensor" else tensors[content].numpy()
    if kind == "dict":
        return {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in content}
    return {"list": list, "tuple": tuple}[kind](_unpacked(item, tensors) for item in content)
