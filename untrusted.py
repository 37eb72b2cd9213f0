"""What a model's files may say, checked before transformers or peft read them.

Model folders and hub repositories are other people's files. Both libraries load weights without running anything, but
their JSON files can name code, sizes and paths; whatever this program does not need is refused, with the name of the
file and of what was found in it.
"""

import json
import math
import re
import zipfile
from pathlib import Path

from cli import ENCODERS, UserError

MOST_LAYERS, MOST_LABELS, MOST_NUMBER = 1_000, 100_000, 1 << 40  # in the config.json of any model that could be meant
SPARE_NUMBERS = 1 << 24  # that a model may have beyond its weights file, such as masks
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
MODULE_NAME = re.compile(r"[\w.]+", re.ASCII)

# what an adapter_config.json may set; of everything else only peft's own default is taken
ADAPTER_SETTINGS = set(
    "base_model_name_or_path bias exclude_modules fan_in_fan_out inference_mode "
    "init_lora_weights layers_to_transform lora_alpha lora_dropout modules_to_save peft_type peft_version r revision "
    "target_modules task_type use_dora use_rslora".split()
)


def read_json(path: str | Path, what: str) -> dict:
    """The object in a JSON file.

    Args:
        what: the user's name for it, which an error begins with.

    Raises:
        UserError: if it is no JSON object (or one nested beyond reason).
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{what}: expected JSON, found something else ({type(error).__name__}: {error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{what}: expected a JSON object, found {type(found).__name__}")
    return found


def check_model(name: str, option: str, trust_remote_code: bool) -> None:
    """Refuses a model whose files name code, kernels to fetch, files elsewhere, or sizes that no model has.

    Args:
        name: hub id or folder. option: what the user gave, for the message. trust_remote_code: code is allowed.

    Raises:
        UserError: with the file and what was found in it.
    """
    for file in (
        "config.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
    ):
        path = _find(name, file)
        if path is None:
            continue
        what = f"{option} {name}: {file}"
        content = read_json(path, what)
        if file.endswith(".index.json"):
            _check_index(content, what)
            continue
        most = content.get("model_max_length", 1)
        if not isinstance(most, (int, float)) or not most >= 1:
            raise UserError(f"{what}: model_max_length: expected a number of tokens, found {str(most)[:40]!r}")
        for key, value in _walk(content):
            if key == "auto_map" and value and not trust_remote_code:
                raise UserError(
                    f"{what} names code of its own (auto_map: {json.dumps(value)[:120]}); nothing of it was run; give "
                    "--trust_remote_code if you know and trust it, or a model without"
                )
            if key.endswith("_implementation") and "/" in str(value):
                raise UserError(
                    f"{what} asks for a kernel from the hub ({key}: {str(value)[:80]}), which is code; nothing was "
                    "fetched; remove that line"
                )
            if file == "config.json":
                _check_number(key, value, what)


def check_size(auto_class, name: str, option: str, config) -> None:
    """Refuses a model folder whose configuration describes a much larger model than its weights are, before anything
    is allocated for it.

    Args:
        auto_class: what it is going to be loaded as. config: its configuration.

    Raises:
        UserError: with both numbers.
    """
    import torch

    held = _numbers_held(Path(name))
    if held is None:  # the loader says what is missing
        return
    with torch.device("meta"):
        model = auto_class.from_config(config)
    asked = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if asked > 4 * held + SPARE_NUMBERS:  # four times: tied embeddings are counted each time
        raise UserError(
            f"{option} {name}: config.json describes a model of {asked:,} numbers, its weights have {held:,}; nothing "
            "was allocated; the two files do not belong together"
        )


def check_vocabulary(tokenizer, model, name: str, option: str) -> None:
    """Refuses a tokenizer that gives ids for which its model has no embedding.

    Raises:
        UserError: with both numbers.
    """
    rows, known = model.get_input_embeddings().weight.shape[0], tokenizer.get_vocab()
    most = max((known[token] for token in known.keys() - tokenizer.get_added_vocab().keys()), default=0) + 1
    if most > rows:
        raise UserError(f"{option} {name}: its tokenizer has {most:,} tokens, its model has {rows:,} embeddings")


def check_adapter(folder: str | Path, option: str) -> dict:
    """The content of `adapter_config.json` in a folder, if all it asks for is plain LoRA.

    peft takes names of modules to import, of files and of initialisations that read others from there; here only
    `ADAPTER_SETTINGS` may differ from their defaults, and the rank must be that of the weights.

    Raises:
        UserError: naming what was found; if the weights are not in `adapter_model.safetensors` (never a pickle).
    """
    from peft import LoraConfig

    folder = Path(folder)
    what = f"{option} {folder}: adapter_config.json"
    config = read_json(folder / "adapter_config.json", what)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{what}: expected a LoRA adapter, found peft_type {str(config.get('peft_type'))[:60]!r}")
    defaults = LoraConfig().to_dict()
    for key, value in config.items():
        if key not in ADAPTER_SETTINGS and value and value != defaults.get(key):
            raise UserError(f"{what} sets {key[:60]}, which no adapter of this program does; nothing of it was used")
    if not isinstance(config.get("init_lora_weights", True), bool):
        raise UserError(f"{what} sets init_lora_weights to {str(config['init_lora_weights'])[:60]!r}: expected true")
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        names = config.get(key) or []
        names = [names] if names == "all-linear" else names
        if not isinstance(names, list) or not all(isinstance(n, str) and MODULE_NAME.fullmatch(n) for n in names):
            raise UserError(f"{what}: {key}: expected a list of names of modules, found {str(names)[:80]!r}")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{option} {folder}: expected adapter_model.safetensors beside adapter_config.json, found none")
    rank, widest = config.get("r"), max((shape[0] for shape in _shapes(weights, option) if shape), default=0)
    if type(rank) is not int or not 0 < rank <= widest:
        raise UserError(f"{what}: r: expected the rank of its weights (at most {widest}), found {str(rank)[:60]}")
    return config


def named_by_file(name: str, file: str | Path) -> str:
    """`name`, the id or folder of a model that `file` names, if it is on this machine or one of this program's own: no
    file makes this program fetch something.

    Raises:
        UserError: otherwise, saying what to do.
    """
    if _is_folder(name) or name in ENCODERS.values():
        return name
    if not HUB_ID.fullmatch(name) or ".." in name:
        raise UserError(f"{file}: names the model {name[:120]!r}: expected a hub id or an existing folder")
    if _find(name, "config.json", local=True) is None:
        raise UserError(
            f"{file}: names the model {name}, which is not on this machine, and a file does not make this program "
            f"fetch one; if you trust it, run: hf download {name}"
        )
    return name


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except ValueError:  # a null character
        return False


def _find(name: str, file: str, local: bool = False) -> str | None:
    """A file of a model's folder, or of its hub repository."""
    if _is_folder(name):
        path = Path(name) / file
        return str(path) if path.is_file() else None
    from transformers.utils.hub import cached_file

    try:
        return cached_file(
            name,
            file,
            local_files_only=local,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # no hub id: the loader says so
        return None


def _walk(content: dict):
    """(key, value) of every entry of nested JSON, however deep; items of a list have the list's key."""
    left = [("", content)]
    while left:
        key, value = left.pop()
        yield key, value
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += [(key, inner) for inner in value]


def _check_number(key: str, value, what: str) -> None:
    most = MOST_LAYERS if "layer" in key else MOST_LABELS if "label" in key else MOST_NUMBER
    if isinstance(value, int) and abs(value) > most:
        raise UserError(f"{what}: {key[:60]}: expected at most {most:,}, found {str(value)[:40]}")


def _check_index(content: dict, what: str) -> None:
    files = content.get("weight_map")
    if not isinstance(files, dict):
        raise UserError(f"{what}: expected a weight_map, found none")
    for file in files.values():
        if not isinstance(file, str) or file in ("", ".", "..") or any(c in file for c in "/\\\0"):
            raise UserError(f"{what} names the file {str(file)[:120]!r}: expected one beside it")


def _numbers_held(folder: Path) -> int | None:
    """How many numbers the weights files of a folder hold (of pickled ones: at most); None without any."""
    safe = [path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_")]
    if safe:
        return sum(math.prod(shape) for path in safe for shape in _shapes(path, "the weights"))
    pickled = [path for path in folder.glob("*.bin") if path.is_file()]
    for path in pickled:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(member.compress_type for member in archive.infolist()):
                    raise UserError(f"{path}: expected what torch.save writes, found a compressed archive")
    return sum(path.stat().st_size for path in pickled) if pickled else None


def _shapes(path: Path, option: str) -> list[list[int]]:
    """Shapes of the tensors in a safetensors file, from its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (a handle, not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{option} {path}: expected a safetensors file, found something else ({error})") from None
