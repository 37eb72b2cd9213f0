"""Loads models, tokenizers and adapters, after checks of what their files ask for.

Model folders and hub repositories come from other people. transformers and peft load weights without running code, but
a JSON file can name code to import, kernels to fetch, files elsewhere, or sizes that do not fit into memory. Whatever
this program does not need is refused, with the name of the file and of what was found in it.
"""

import json
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.utils.hub import cached_file

from geli.nets.options import ENCODERS
from geli.run.errors import UserError, first_line, one_line

# largest numbers accepted in a config.json: of layers, of labels, and of anything else
MAX_LAYERS, MAX_LABELS, MAX_NUMBER = 1_000, 100_000, 1 << 40
SPARE_NUMBERS = 1 << 24  # numbers that a model may have besides those in its weights file, such as masks
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
MODULE_NAME = re.compile(r"[\w.]+", re.ASCII)
JSON_FILES = ("config.json", "tokenizer_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
# what an adapter_config.json may set; any other setting must have peft's default
ADAPTER_SETTINGS = set(
    "base_model_name_or_path bias exclude_modules fan_in_fan_out inference_mode "
    "init_lora_weights layers_to_transform lora_alpha lora_dropout modules_to_save peft_type peft_version r revision "
    "target_modules task_type use_dora use_rslora".split()
)

# ---------------------------------------------------------------------------------------------------------------------
# Models and tokenizers


def load_pretrained(auto_class, name: str, option: str, trust_remote_code: bool = False, config=None, **arguments):
    """`auto_class.from_pretrained(name)` after the checks of this module; offline if `name` is a folder.

    Args:
        name: hub id or folder. option: the option that names it, for error messages.
        trust_remote_code: run code that the model brings along; without it such a model is refused.
        config: the configuration, when a model is loaded (not a tokenizer or a configuration).

    Raises:
        UserError: if it is refused, cannot be loaded, or lacks some of its weights.
    """
    quiet_transformers()
    local = Path(name).is_dir()
    check_exists(name, option)
    check_model(name, option, trust_remote_code)
    missing = []
    try:
        if config is not None:
            arguments |= {"config": config, "output_loading_info": True}
            if local and (Path(name) / "adapter_config.json").is_file():  # transformers would load its base model
                raise UserError(f"{option} {name}: expected a whole model, found an adapter (adapter_config.json)")
            if quantized := getattr(config, "quantization_config", None):
                raise UserError(f"{option} {name}: {_said_of_quantization(quantized)}")
            if local and not trust_remote_code:
                check_size(auto_class, name, option, config)
        loaded = auto_class.from_pretrained(
            name, local_files_only=local, trust_remote_code=trust_remote_code, **arguments
        )
        if config is not None:
            loaded, info = loaded
            missing = [key for key in info["missing_keys"] if "pooler" not in key]
            if auto_class is AutoModel:  # an encoder: the decoder is never run
                missing = [key for key in missing if not key.startswith("decoder.")]
    except UserError:
        raise
    except UnpicklingError:  # torch's message advises to load it unsafely
        raise UserError(
            f"{option} {name}: its pickled weights hold more than tensors; nothing of them was run; expected "
            "model.safetensors, or a .bin file of tensors alone"
        ) from None
    except Exception as error:  # other people's files can fail in any way
        kind = "folder" if local else "hub id (and no folder of that name is here)"
        hint = f"; run `hf download {name}` where there is a network, or name a folder"
        reason = first_line(error)[:300] + hint * ("connect to" in str(error))
        raise UserError(f"{option} {name}: this {kind} could not be loaded: {reason}") from None
    if missing:
        raise UserError(
            f"{option} {name}: its weights lack {len(missing)} that its config.json asks for, such as {min(missing)}"
        )
    if config is not None:
        check_finite(loaded, name, option)
    return loaded


def check_exists(name: str, option: str) -> None:
    """Refuses a name that can only be meant as a folder, and is none, because a hub would be asked for it: one with a
    leading dot or slash or several slashes, or one in a folder that is here. Names what is in that folder.

    Raises:
        UserError: with these names.
    """
    path = Path(name)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or (path.name != name and path.parent.is_dir())
    if not is_path or path.is_dir() or (not name.startswith("/") and _find(name, "config.json", local=True)):
        return
    folder = next((parent for parent in path.parents if parent.is_dir()), Path("."))
    beside = sorted(found.name for found in folder.iterdir() if found.is_dir() and not found.name.startswith("."))
    shown = ", ".join([*beside[:9], *(["…"] if len(beside) > 9 else [])])
    raise UserError(
        f"{option} {name}: expected a model's folder, found none; the folders in {folder}: {shown or 'none'}"
    )


def quiet_transformers() -> None:
    """Turns off transformers' progress bars and its warnings, on which users cannot act."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def read_json(path: str | Path, label: str) -> dict:
    """The object in a JSON file, which error messages call `label`. Raises a `UserError` if it is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{label}: expected JSON, found something else ({type(error).__name__}: {error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{label}: expected a JSON object, found {type(content).__name__}")
    return content


def check_model(name: str, option: str, trust_remote_code: bool) -> None:
    """Refuses a model (hub id or folder) whose JSON files name code, kernels, files elsewhere, or impossible sizes."""
    for file in JSON_FILES:
        path = _find(name, file)
        if path is None:
            continue
        label = f"{option} {name}: {file}"
        content = read_json(path, label)
        if file.endswith(".index.json"):
            _check_index(content, label)
            continue
        limit = content.get("model_max_length", 1)
        if not isinstance(limit, (int, float)) or not limit >= 1:
            raise UserError(f"{label}: model_max_length: expected a number of tokens, found {str(limit)[:40]!r}")
        for key, value in _walk(content):
            if key == "auto_map" and value and not trust_remote_code:
                raise UserError(
                    f"{label} names code of its own (auto_map: {json.dumps(value)[:120]}); nothing of it was run; give "
                    "--trust_remote_code if you know and trust it, or a model without"
                )
            if key.endswith("_implementation") and "/" in str(value):
                raise UserError(
                    f"{label} asks for a kernel from the hub ({key}: {str(value)[:80]}), which is code; nothing was "
                    "fetched; remove that line"
                )
            if file == "config.json":
                _check_number(key, value, label)


def check_size(auto_class, name: str, option: str, config) -> None:
    """Refuses a model folder whose configuration describes a much larger model than its weights files hold, before
    anything is allocated."""
    held = _numbers_held(Path(name))
    if held is None:  # no weights file: from_pretrained reports it
        return
    with torch.device("meta"):
        model = auto_class.from_config(config)
    described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if described > 4 * held + SPARE_NUMBERS:  # 4: tied embeddings are counted up to four times
        raise UserError(
            f"{option} {name}: config.json describes a model of {described:,} numbers, its weights have {held:,}; "
            "nothing was allocated; the two files do not belong together"
        )


def _said_of_quantization(found) -> str:
    """Why a model with such a `quantization_config` is refused."""
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    method = one_line(str(getattr(method, "value", method)))[:40]
    return f"quantized ({method}): expected weights in float: give the model that it was made of"


def check_finite(model, name: str, option: str) -> None:
    """Refuses weights that are not finite, of which everything would be NaN.

    Raises:
        UserError: with the first of them.
    """
    for weight, values in model.named_parameters():
        if values.numel() and values.is_floating_point() and not torch.stack(values.aminmax()).isfinite().all():
            raise UserError(f"{option} {name}: its weights hold values that are not finite, the first in {weight}")


def check_vocabulary(tokenizer, model, name: str, option: str) -> None:
    """Refuses a tokenizer with ids for which its model has no embedding. A padding token without one, which some
    tokenizers were given later, is replaced by the end token: what stands where the mask is 0 is never read.

    Raises:
        UserError: with both numbers.
    """
    rows, vocabulary = model.get_input_embeddings().weight.shape[0], tokenizer.get_vocab()
    own = vocabulary.keys() - tokenizer.get_added_vocab().keys()
    size = max((vocabulary[token] for token in own), default=0) + 1
    if size > rows:
        raise UserError(f"{option} {name}: its tokenizer has {size:,} tokens, its model has {rows:,} embeddings")
    if (tokenizer.pad_token_id or 0) >= rows:
        tokenizer.pad_token = tokenizer.eos_token


def named_by_file(name: str, file: str | Path) -> str:
    """`name`, the id or folder of a model that `file` names. Raises a `UserError` unless it is on this machine, or one
    of `ENCODERS`: the content of a file never starts a download."""
    if Path(name).is_dir() or name in {alias.hub_id for alias in ENCODERS.values()}:
        return name
    if not HUB_ID.fullmatch(name) or ".." in name:
        raise UserError(f"{file}: names the model {name[:120]!r}: expected a hub id or an existing folder")
    if _find(name, "config.json", local=True) is None:
        raise UserError(
            f"{file}: names the model {name}, which is not on this machine, and a file does not make this program "
            f"fetch one; if you trust it, run: hf download {name}"
        )
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def load_adapter(model: torch.nn.Module, folder: str, option: str) -> PeftModel:
    """`model` with the LoRA adapter in `folder`, trainable. `recorded_base` must have checked the folder. Raises a
    `UserError` if the adapter does not fit the model."""
    try:
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=True)
        check_adapter_weights(adapted, folder)
    except Exception as error:  # other people's files can fail in any way
        raise UserError(f"{option} {folder}: this adapter could not be loaded: {first_line(error)}") from None
    return adapted


def recorded_base(folder: str | Path, option: str) -> str:
    """The base model that the adapter in `folder` records: a hub id or a folder, which may not exist."""
    base = check_adapter(folder, option).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{option} {folder}: adapter_config.json in it names no base_model_name_or_path")
    return base


def check_adapter(folder: str | Path, option: str) -> dict:
    """The content of `adapter_config.json` in a folder, if it describes a plain LoRA adapter.

    peft accepts names of modules to import, and initialisations that read other files. Here only `ADAPTER_SETTINGS` may
    differ from peft's defaults, and the rank must be possible for the shapes of the weights.

    Raises:
        UserError: with what was found; if the weights are not in `adapter_model.safetensors` (never a pickle).
    """
    folder = Path(folder)
    label = f"{option} {folder}: adapter_config.json"
    config = read_json(folder / "adapter_config.json", label)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{label}: expected a LoRA adapter, found peft_type {str(config.get('peft_type'))[:60]!r}")
    defaults = LoraConfig().to_dict()
    for key, value in config.items():
        if key not in ADAPTER_SETTINGS and value and value != defaults.get(key):
            raise UserError(f"{label} sets {key[:60]}, which no adapter of this program does; nothing of it was used")
    if not isinstance(config.get("init_lora_weights", True), bool):
        raise UserError(f"{label} sets init_lora_weights to {str(config['init_lora_weights'])[:60]!r}: expected true")
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        names = config.get(key) or []
        names = [names] if names == "all-linear" else names
        if not isinstance(names, list) or not all(isinstance(n, str) and MODULE_NAME.fullmatch(n) for n in names):
            raise UserError(f"{label}: {key}: expected a list of names of modules, found {str(names)[:80]!r}")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{option} {folder}: expected adapter_model.safetensors beside adapter_config.json, found none")
    rank, widest = config.get("r"), max((shape[0] for shape in _shapes(weights, option) if shape), default=0)
    if type(rank) is not int or not 0 < rank <= widest:
        raise UserError(f"{label}: r: expected the rank of its weights (at most {widest}), found {str(rank)[:60]}")
    return config


def check_adapter_weights(model: PeftModel, folder: str | Path) -> dict[str, torch.Tensor]:
    """The weights of the adapter in a folder. peft ignores missing weights without a message, so they are compared.

    Raises:
        ValueError: if they are not finite, or do not have exactly the names and shapes of the adapter of `model`.
    """
    saved, own = load_file(Path(folder) / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    for name in saved.keys() & own.keys():
        if saved[name].shape != own[name].shape:
            shapes = " and ".join(str(tuple(tensors[name].shape)) for tensors in (saved, own))
            raise ValueError(f"{name} has the shapes {shapes} in the adapter and in the model")
    if saved.keys() != own.keys():
        raise ValueError(f"its {len(saved)} tensors are not the {len(own)} that this model's adapter has")
    if not all(torch.isfinite(tensor).all() for tensor in saved.values()):
        raise ValueError("weights that are not finite")
    return saved


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _find(name: str, file: str, local: bool = False) -> str | None:
    """The path of a file in a model's folder or hub repository (fetched unless `local`); None if there is none."""
    if Path(name).is_dir():
        path = Path(name) / file
        return str(path) if path.is_file() else None
    try:
        return cached_file(
            name, file, local_files_only=local, _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except (OSError, ValueError):  # not a hub id: from_pretrained reports it
        return None


def _walk(content: dict) -> Iterator[tuple[str, object]]:
    """(key, value) of every entry of nested JSON, without recursion; items of a list have the list's key."""
    left = [("", content)]
    while left:
        key, value = left.pop()
        yield key, value
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += [(key, inner) for inner in value]


def _check_number(key: str, value, label: str) -> None:
    limit = MAX_LAYERS if "layer" in key else MAX_LABELS if "label" in key else MAX_NUMBER
    if isinstance(value, int) and abs(value) > limit:
        raise UserError(f"{label}: {key[:60]}: expected at most {limit:,}, found {str(value)[:40]}")


def _check_index(content: dict, label: str) -> None:
    files = content.get("weight_map")
    if not isinstance(files, dict):
        raise UserError(f"{label}: expected a weight_map, found none")
    for file in files.values():
        if not isinstance(file, str) or file in ("", ".", "..") or any(c in file for c in "/\\\0"):
            raise UserError(f"{label} names the file {str(file)[:120]!r}: expected one beside it")


def _numbers_held(folder: Path) -> int | None:
    """How many numbers the weights files of a folder hold (an upper bound for .bin files); None if there are none."""
    safe = [path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_")]
    if safe:
        return sum(math.prod(shape) for path in safe for shape in _shapes(path, "the weights"))
    pickled = [path for path in folder.glob("*.bin") if path.is_file()]
    for path in filter(zipfile.is_zipfile, pickled):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type for member in archive.infolist()):
                raise UserError(f"{path}: expected what torch.save writes, found a compressed archive")
    return sum(path.stat().st_size for path in pickled) if pickled else None


def _shapes(path: Path, option: str) -> list[list[int]]:
    """Shapes of the tensors in a safetensors file, from its header alone."""
    try:
        with safe_open(path, "pt") as file:
            return [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (a handle, not a dict)
    except (SafetensorError, OSError) as error:
        with open(path, "rb") as file:
            lfs = file.read(24) == b"version https://git-lfs."
        found = "a pointer to it: run git lfs pull in its folder" if lfs else f"something else ({error})"
        raise UserError(f"{option} {path}: expected a safetensors file, found {found}") from None
