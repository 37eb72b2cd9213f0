"""Reward heads on disk, and the encoders that they were trained on: saving, finding and loading them."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from geli.data.questions import QUESTIONS
from geli.nets.encoder import TurnEncoder, load_encoder
from geli.nets.pretrained import named_by_file
from geli.nets.published_heads import NotPublished, read_published_head
from geli.rl.reward_options import ENSEMBLES
from geli.run.errors import UserError, first_line
from geli.run.files import atomic_path
from geli.run.run_names import record_path
from models import DECOMPOSITIONS, RewardHead, RewardHeadConfig, new_reward_head

_HEAD_FORMAT = "geli-reward-head-1"
_PLAIN = {"members": 1, "decorrelate": 0.0}  # is not recorded


def save_reward_head(head: RewardHead, path: str | Path) -> None:
    """Writes one safetensors file with the head's configuration in its metadata, atomically."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    recorded = {name: value for name, value in asdict(head.config).items() if (name, value) not in _PLAIN.items()}
    config = json.dumps({"format": _HEAD_FORMAT, **recorded})
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={"config": config})  # one entry: the order of several is not fixed


def load_reward_head(path: str | Path) -> RewardHead:
    """Reads a saved head (`reward1_{run}`), ours or a published one (see `geli.nets.published_heads`).

    Returns:
        An eval-mode module that maps features (n, hidden) to rewards (n, 1); its `config` records its training.

    Raises:
        UserError: if the file is missing or is no reward head.
    """
    path = Path(path)
    if _is_zip(path):
        return _load_published_head(path)
    try:
        with safe_open(path, "pt") as file:
            config = (file.metadata() or {}).get("config", "")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle, not a dict)
    except FileNotFoundError:
        raise UserError(f"{path}: no such reward head") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: expected a reward head (a safetensors file), found something else ({error})"
        ) from None
    if f'"{_HEAD_FORMAT}"' not in config:
        raise UserError(f"{path}: a safetensors file, but not a reward head: its metadata has no format {_HEAD_FORMAT}")
    try:
        head = _head_of(json.loads(config), state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(f"{path}: a reward head that does not fit its own configuration ({reason})") from None
    return head.eval()


def score_as(head: RewardHead, path: Path, ensemble: str = "mean", spread_penalty: float = 1.0) -> RewardHead:
    """The head that was read from `path`, of which an ensemble scores as `ensemble`, a key of `ENSEMBLES`, says.

    Raises:
        UserError: if it has no such key; if one head is to score as several; for the mean of weights of heads that did
            not start alike, which is no reward.
    """
    if ensemble not in ENSEMBLES:
        raise UserError(f"ensemble {ensemble}: expected one of {', '.join(ENSEMBLES)}")
    if ensemble == "mean":
        return head
    if head.config.members == 1:
        raise UserError(f"--ensemble {ensemble}: {path} is one head: train several with train_reward_GELI.py --heads K")
    if ensemble == "lower":
        head.spread_penalty = spread_penalty
        return head
    if not head.config.li:
        raise UserError(
            f"--ensemble weights: the heads of {path} started from different weights, whose mean means nothing: train "
            "them with --affect_path, from one start, or take another --ensemble"
        )
    return head.mean_of_weights()


def _head_of(config: dict, state: dict[str, torch.Tensor]) -> RewardHead:
    """The head with this recorded configuration and these weights. Raises a ValueError, among others, if they do not
    fit; a head that claims to be huge is refused before memory is allocated for it."""
    config = RewardHeadConfig(**{name: value for name, value in config.items() if name != "format"})
    config.check()
    if config.members > len(state):
        raise ValueError(f"it has {len(state)} tensors, too few for {config.members} heads")
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in new_reward_head(config).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != expected:
        raise ValueError(f"its tensors are {found}, expected {expected}"[:400])
    if not all(tensor.is_floating_point() and torch.isfinite(tensor.float()).all() for tensor in state.values()):
        raise ValueError("weights that are not finite numbers")
    head = new_reward_head(config)
    head.load_state_dict(state)
    return head


def _is_zip(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:
        return False  # reading it as safetensors reports what is wrong


def _load_published_head(path: Path) -> RewardHead:
    """The head in a published file, which records no configuration: it is read off the folder's name."""
    try:
        tensors = read_published_head(path)
    except NotPublished as error:
        raise UserError(f"{path}: expected a reward head, refused: {error}") from None
    folder = path.resolve().parent.name
    ending = folder.split("_baseline_")[-1]
    config = RewardHeadConfig(
        head="published", hidden=tensors[0].shape[1], encoder=None, encoder_is_folder=False, max_length=1024,
        context_turns=20, stage=1 if "reward_function" in folder else 2,
        reward_class=next((name for name in QUESTIONS if f"_{name}_" in f"{folder}_"), None),
        redist_type=next((name for name in DECOMPOSITIONS if ending.startswith(f"{name}_")), None),
        li=not folder.startswith("baselines_"),
    )  # fmt: skip
    head = RewardHead(config)
    names = ("layers.0.weight", "layers.0.bias", "layers.3.weight", "layers.3.bias")
    head.load_state_dict(dict(zip(names, tensors, strict=True)))
    return head.eval()


PUBLISHED_ENCODER = "lang_model_devout-brook-114"  # the encoder of the published heads
STAGE_1_FOLDERS = "*reward_function_*"  # under --output_dir


def saved_heads(output_dir: str | Path, folders: str = "*") -> list[Path]:
    """The reward heads in the folders of `output_dir` that match the pattern `folders`."""
    return [path for path in Path(output_dir).glob(f"{folders}/reward1_*") if not path.name.endswith(".json")]


def is_finished(path: Path) -> bool:
    """Whether the run that made a head has finished, so that its record is beside it. Published heads have none, and
    are finished."""
    return record_path(path.parent, path.name.removeprefix("reward1_")).is_file() or _is_zip(path)


def find_head(name: str, output_dir: str | Path, folders: str = "*") -> Path:
    """The file of a head. `name` is its path, the name of a run in a folder of `output_dir` that matches `folders`, or
    a folder with one head in it. Raises a `UserError` if there is none, or several runs have that name."""
    path = Path(name)
    if path.is_file():
        return path
    heads = saved_heads(output_dir, folders)
    found = sorted(path for path in heads if path.name == f"reward1_{name}")
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{name}: {len(found)} runs have that name; give one's path: {', '.join(map(str, found))}")
    if path.is_dir():
        inside = sorted(saved_heads(path, "."))
        if len(inside) == 1:
            return inside[0]
        names = ", ".join(head.name for head in inside) or "none"
        raise UserError(f"{path}: expected one reward head in this folder, found {names}; give the path of a file")
    known = sorted(path.name.removeprefix("reward1_") for path in heads)
    others = [path for path in saved_heads(output_dir) if path.name == f"reward1_{name}"]
    neither = f"only {others[0]}, which is of another stage," if others else "neither"
    raise UserError(
        f"{name}: expected a run name or the path of a reward1_ file, found {neither} under {output_dir}; "
        f"runs there: {', '.join(known) or 'none'}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The encoder of a saved head


def encoder_of_head(config: RewardHeadConfig, path: str | Path, named: str | None = None) -> str:
    """The hub id or folder of the encoder that the head at `path` was trained on.

    A published head records none. Its encoder is the one that is `named`, or `lang_model_{run}` beside the head, or
    else `PUBLISHED_ENCODER` in one of the stage-1 folders beside the head's folder.

    Args:
        named: `--lang_model_path`.

    Raises:
        UserError: if one is `named` and the head records its own; if the encoder of a published head is in neither
            place; if a hub id is not on this machine.
    """
    path = Path(path)
    if config.encoder is not None:
        if named:
            raise UserError(
                f"--lang_model_path {named}: {path} records its own encoder, {config.encoder}: leave it out"
            )
        if config.encoder_is_folder:
            return os.path.normpath(path.parent / config.encoder)
        return named_by_file(config.encoder, path)
    own = path.parent / f"lang_model_{path.name.removeprefix('reward1_')}"
    if named or own.is_dir():
        return named or str(own)
    found = sorted(path.resolve().parent.parent.glob(f"*reward_function_*/{PUBLISHED_ENCODER}"))
    if len(found) == 1:
        return str(found[0])
    listed = f"found {len(found)}: {', '.join(map(str, found))}" if found else "found none"
    raise UserError(
        f"{path}: a published head, which does not record its encoder: expected {PUBLISHED_ENCODER}/ in stage 1's "
        f"folder (SINGLE_INDEX_reward_function_…), {listed}; name it with --lang_model_path"
    )


def encoder_reference(encoder: str | Path, head_folder: Path) -> dict:
    """How a head in `head_folder` records its encoder: as a folder relative to its own, or as a hub id."""
    if Path(encoder).is_dir():
        return {"encoder": os.path.relpath(Path(encoder).resolve(), head_folder.resolve()), "encoder_is_folder": True}
    return {"encoder": str(encoder), "encoder_is_folder": False}


def load_encoder_of_head(
    config: RewardHeadConfig, path: str | Path, max_length: int, named: str | None,
    dtype: torch.dtype = torch.float32, trust_remote_code: bool = False,
) -> TurnEncoder:  # fmt: skip
    """Loads the encoder that the head at `path` was trained on (see `encoder_of_head`), which must fit the head."""
    name = encoder_of_head(config, path, named)
    if config.encoder_is_folder and not Path(name).is_dir():  # else it would be looked up on the hub
        raise UserError(f"{path}: expected the encoder that it was trained on in {name}, found no such folder")
    option = f"the encoder that {path} was trained on,"
    encoder = load_encoder(name, max_length, option, dtype=dtype, trust_remote_code=trust_remote_code)
    if encoder.hidden_size != config.hidden:
        raise UserError(f"{path}: takes {config.hidden} features, its encoder {name} gives {encoder.hidden_size}")
    return encoder
