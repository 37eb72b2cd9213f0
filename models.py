"""The text encoder, the reward heads, and the losses of reward training and of PPO.

The losses are pure functions of tensors; the loops that call them are in the entry scripts and in `ppo.py`.
"""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import pairwise, takewhile
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import nn

from cli import REWARD_CLASSES, UserError, one_line
from data_utils import INSTRUCTION, token_batches
from untrusted import check_adapter, check_model, check_size, check_vocabulary, named_by_file

# ---------------------------------------------------------------------------------------------------------------------
# Losses of reward training


def predicted_return(rewards: torch.Tensor, length: float) -> torch.Tensor:
    """R_GE of a trajectory from rewards of a subset I of its turns: (L/|I|) sum_{t in I} r_t (DESIGN.md section 1).

    Args:
        rewards: (k,) r_t of the turns in I. length: L, in turns.

    Returns:
        () in points.
    """
    return length * rewards.mean()


def rrd_loss(rewards: torch.Tensor, score: float, length: float) -> torch.Tensor:
    """Randomized return decomposition (Ren et al., ICLR 2022, eq. 6): the subset's estimate of the return against R.

    Args:
        rewards: (k,) r_t of a random subset of distinct turns. score: R in points. length: L in turns.

    Returns:
        () in points squared.
    """
    return (score - predicted_return(rewards, length)) ** 2


def li_loss(rewards: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-modal distillation: mean squared error of r_t against the listener's affect f_t.

    Args:
        rewards: (n,). targets: (n,) in [-1, 1].
    """
    return ((rewards - targets) ** 2).mean()


def geli_loss(ge: torch.Tensor, li: torch.Tensor, weight: float, ge_scale: float = 1.0, li_scale: float = 1.0):
    """lambda * L_GE / ge_scale + (1 - lambda) * L_LI / li_scale; scales of 1 are the published loss."""
    return weight * ge / ge_scale + (1 - weight) * li / li_scale


def ircr_loss(rewards: torch.Tensor, score: float, length: float) -> torch.Tensor:
    """Every turn regresses to its even share R/L of the score (Gangwani et al., NeurIPS 2020).

    Args:
        rewards: (T,). score: R in points. length: L in turns.

    Returns:
        () in (points a turn) squared.
    """
    return ((rewards - score / length) ** 2).mean()


def rudder_loss(rewards: torch.Tensor, score: float, length: float) -> torch.Tensor:
    """The return predicted after every turn against R: last-step error^2 + 0.5 * mean error^2 over all steps
    (Arjona-Medina et al., NeurIPS 2019, auxiliary task of section A8).

    Args:
        rewards: (T,) differences of successive predictions, so that prediction t is the sum up to t. score: R in
            points. length: not used.

    Returns:
        () in points squared.
    """
    errors = (score - rewards.cumsum(dim=0)) ** 2
    return errors[-1] + 0.5 * errors.mean()


def supervised_contrastive_loss(hidden: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """SupCon (Khosla et al., NeurIPS 2020, eq. 2): rows of one label attract, all others repel.

    Args:
        hidden: (n, d), normalised here. labels: (n,) integers. temperature: of the softmax.

    Returns:
        (), mean over the rows that have another of their label; 0 when there is none.
    """
    z = nn.functional.normalize(hidden.float(), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = (z @ z.T / temperature).masked_fill(itself, -torch.inf).log_softmax(dim=1).masked_fill(itself, 0.0)
    alike = (labels[:, None] == labels[None]) & ~itself
    n_alike = alike.sum(dim=1)
    per_row = -(log_p * alike).sum(dim=1) / n_alike.clamp(min=1)
    return per_row.sum() / (n_alike > 0).sum().clamp(min=1)


CONTRASTIVE_TEMPERATURE, CONTRASTIVE_WEIGHT = 0.3, 0.3


def contrastive_term(hidden: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    """() what `--contrastive` adds every second epoch, of the head's hidden layer (n, d) and labels (n,)."""
    labels = torch.as_tensor(labels, device=hidden.device)
    return CONTRASTIVE_WEIGHT * supervised_contrastive_loss(hidden, labels, CONTRASTIVE_TEMPERATURE)


class Decomposition(NamedTuple):
    """A way to train turn rewards from one score.

    Attributes:
        loss: (rewards (k,), score, length) -> () loss to train on.
        predicted_return: (rewards (k,), length) -> () what L_GE compares with R, in points.
        target: (scores, lengths) -> what the loss regresses to; its variance scales `--loss_scale normalized`.
        uses_subset: whether the return is estimated on K random turns (else on all, in order).
        head: the head that it needs, a key of `HEADS`; None for the one that the options choose.
    """

    loss: Callable[[torch.Tensor, float, float], torch.Tensor]
    predicted_return: Callable = predicted_return
    target: Callable = lambda scores, lengths: scores
    uses_subset: bool = False
    head: str | None = None


DECOMPOSITIONS = {
    "RRD": Decomposition(rrd_loss, uses_subset=True),
    "IRCR": Decomposition(ircr_loss, target=lambda scores, lengths: scores / lengths),
    "RUDDER": Decomposition(rudder_loss, predicted_return=lambda rewards, length: rewards.sum(), head="rudder"),
}


def draw_turns(n_turns: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """A random subset of min(K, T) distinct turns, ascending."""
    return np.arange(n_turns) if k >= n_turns else np.sort(rng.choice(n_turns, size=k, replace=False))


# ---------------------------------------------------------------------------------------------------------------------
# Reward heads: features of a turn (n, hidden) -> reward (n, 1)


@dataclass(frozen=True)
class RewardHeadConfig:
    """What a saved head says of itself.

    Attributes:
        head: a key of `HEADS`. hidden: the encoder's width.
        encoder: the encoder that it was trained on: a hub id, or a folder relative to the head's file; None where the
            file (a published one) records none.
        encoder_is_folder: which of the two.
        max_length, context_turns: how its input text was cut.
        stage: 1 or 2. reward_class: the score, None where not recorded. redist_type: the decomposition (stage 2).
        li: trained with LI. li_signal, sentiment_model: where LI's targets came from.
    """

    head: str
    hidden: int
    encoder: str | None
    encoder_is_folder: bool
    max_length: int
    context_turns: int
    stage: int
    reward_class: str | None
    redist_type: str | None = None
    li: bool = True
    li_signal: str = "face"
    sentiment_model: str | None = None

    def check(self) -> None:
        """Raises a ValueError for what no head says of itself."""
        kinds = {field.name: field.type for field in fields(self)}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if (type(value) not in get_args(kind)) if get_args(kind) else type(value) is not kind:
                raise ValueError(f"{name}: expected {getattr(kind, '__name__', kind)}, found {value!r}"[:200])
        known = {
            "head": HEADS,
            "stage": (1, 2),
            "reward_class": (None, *REWARD_CLASSES),
            "redist_type": (None, *DECOMPOSITIONS),
            "li_signal": ("face", "sentiment"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: unknown: {getattr(self, name)!r}"[:200])
        for name in ("hidden", "max_length", "context_turns"):
            if not 1 <= getattr(self, name) < 1 << 31:
                raise ValueError(f"{name}: expected at least 1 and less than 2**31, found {getattr(self, name)}"[:200])
        if self.encoder is not None and not (self.encoder.isprintable() and self.encoder):
            raise ValueError(f"encoder: expected a hub id or a folder, found {self.encoder!r}"[:200])
        if self.encoder_is_folder and (self.encoder is None or Path(self.encoder).is_absolute()):
            raise ValueError(f"encoder: expected a folder relative to the head's, found {self.encoder}"[:200])


def _relu_stack(*widths: int, normalize: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between them; `normalize`: LayerNorm before each ReLU."""
    layers: list[nn.Module] = [nn.Linear(*widths[:2])]
    for before, after in pairwise(widths[1:]):
        layers += [nn.LayerNorm(before)] * normalize + [nn.ReLU(), nn.Linear(before, after)]
    return nn.Sequential(*layers)


def default_head(hidden: int) -> nn.Sequential:
    """h-768-128-32-1 with ReLU between the layers."""
    return _relu_stack(hidden, 768, 128, 32, 1)


def hard_shrink_head(hidden: int) -> nn.Sequential:
    """`--hard_shrink`: the default head with a GELU at the end."""
    return nn.Sequential(*default_head(hidden), nn.GELU())


def batch_norm_head(hidden: int) -> nn.Sequential:
    """`--batch_norm`: the default head with LayerNorm after each hidden layer."""
    return _relu_stack(hidden, 768, 128, 32, 1, normalize=True)


def small_head(hidden: int) -> nn.Sequential:
    """`--small_model`: h-128-32-1 with ReLU."""
    return _relu_stack(hidden, 128, 32, 1)


def shrink_head(hidden: int) -> nn.Sequential:
    """`--small_model_shrink`: h-128-1 with ReLU, dropout 0.2 after each linear layer, tanh at the end."""
    return nn.Sequential(
        nn.Linear(hidden, 128), nn.Dropout(0.2), nn.ReLU(), nn.Linear(128, 1), nn.Dropout(0.2), nn.Tanh()
    )


class RudderCells(nn.Module):
    """RUDDER's LSTM: the cell input sees the input only, the input gate the recurrence only; no forget or output gate.

    c_t = c_{t-1} + sigmoid(U h_{t-1} + b) * tanh(W x_t + a), h_t = tanh(c_t), from c_0 = h_0 = 0.
    """

    def __init__(self, hidden: int, cells: int = 16):
        super().__init__()
        self.cell_input = nn.Linear(hidden, cells)
        self.input_gate = nn.Linear(cells, cells)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """h (..., T, cells) after each turn of a trajectory (or of several) with features (..., T, hidden)."""
        inputs = torch.tanh(self.cell_input(features))
        cell = output = torch.zeros_like(inputs[..., 0, :])
        outputs = []
        for t in range(inputs.shape[-2]):
            cell = cell + torch.sigmoid(self.input_gate(output)) * inputs[..., t, :]
            output = torch.tanh(cell)
            outputs.append(output)
        return torch.stack(outputs, dim=-2)


class Differences(nn.Module):
    """Predictions of the return after every turn (..., T, 1) -> rewards: each less the one before, the first less 0."""

    def forward(self, predictions: torch.Tensor) -> torch.Tensor:
        """Rewards (..., T, 1), which sum to the last prediction."""
        return torch.diff(predictions, dim=-2, prepend=torch.zeros_like(predictions[..., :1, :]))


def rudder_head(hidden: int) -> nn.Sequential:
    """RUDDER: 16 LSTM cells, the return predicted after every turn, and its differences."""
    return nn.Sequential(RudderCells(hidden), nn.Linear(16, 1), Differences())


HEADS = {
    "default": default_head,
    "hard_shrink": hard_shrink_head,
    "batch_norm": batch_norm_head,
    "small_model": small_head,
    "small_model_shrink": shrink_head,
    "rudder": rudder_head,
}


class RewardHead(nn.Module):
    """r_theta on top of the encoder: (n, hidden) -> (n, 1). `config` is a `RewardHeadConfig`."""

    def __init__(self, config: RewardHeadConfig):
        super().__init__()
        self.config = config
        self.layers = HEADS[config.head](config.hidden)
        self._last = max(i for i, layer in enumerate(self.layers) if isinstance(layer, nn.Linear))

    @property
    def sequential(self) -> bool:
        """Whether a turn's reward depends on the turns before it: rows are then one trajectory's turns, in order."""
        return isinstance(self.layers[0], RudderCells)

    @torch.no_grad()
    def start_at(self, value: float) -> None:
        """Makes an untrained head predict `value` everywhere (or the nearest that its last activation reaches): zero
        weights and a fitting bias in its last linear layer.

        Else what it predicts by chance differs more from turn to turn than training at stage 1's learning rate changes,
        and training goes into shifting the mean.
        """
        last, ending = self.layers[self._last], self.layers[self._last + 1 :]
        nn.init.zeros_(last.weight)
        if not any(isinstance(layer, (nn.Tanh, nn.GELU)) for layer in ending):
            last.bias.fill_(value)
            return
        low, high = (-0.75, 10.0) if isinstance(ending[-1], nn.GELU) else (-10.0, 10.0)  # where it grows
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if ending[-1](torch.tensor(middle)) < value else (low, middle)
        last.bias.fill_(low)

    def forward(self, features: torch.Tensor, with_hidden: bool = False):
        """Rewards (n, 1) of turns with `features` (n, hidden); with `with_hidden` also the last hidden layer (n, d)."""
        hidden = self.layers[: self._last](features)
        rewards = self.layers[self._last :](hidden)
        return (rewards, hidden) if with_hidden else rewards


_HEAD_FORMAT = "geli-reward-head-1"


def save_reward_head(head: RewardHead, path: str | Path) -> None:
    """Writes one safetensors file with the head's configuration in its metadata, atomically."""
    from safetensors.torch import save_file

    from runs import atomic_path

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    config = json.dumps({"format": _HEAD_FORMAT, **asdict(head.config)})
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={"config": config})  # one entry: several would lie in any order


def load_reward_head(path: str | Path, device: str | torch.device = "cpu") -> RewardHead:
    """Reads a saved head (`reward1_{run}`), ours or a published one (see `published.py`).

    Returns:
        An eval-mode module mapping features (n, hidden) to rewards (n, 1); its `config` says what it was trained on.

    Raises:
        UserError: if the file is missing or is no reward head.
    """
    from safetensors import SafetensorError, safe_open

    from runs import first_line

    path = Path(path)
    if _is_zip(path):
        return _load_published_head(path).to(device)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle, not a dict)
    except FileNotFoundError:
        raise UserError(f"{path}: no such reward head") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: expected a reward head (a safetensors file), found something else ({error})"
        ) from None
    if f'"{_HEAD_FORMAT}"' not in metadata.get("config", ""):
        raise UserError(f"{path}: a safetensors file, but not a reward head: its metadata has no format {_HEAD_FORMAT}")
    try:
        known = {field.name for field in fields(RewardHeadConfig)}
        config = RewardHeadConfig(**{k: v for k, v in json.loads(metadata["config"]).items() if k in known})
        config.check()
        with torch.device("meta"):  # a head of that configuration, of which nothing is allocated
            expected = {name: tuple(tensor.shape) for name, tensor in RewardHead(config).state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if found != expected:
            raise ValueError(f"its tensors are {found}, expected {expected}"[:400])
        if not all(tensor.is_floating_point() and torch.isfinite(tensor.float()).all() for tensor in state.values()):
            raise ValueError("weights that are not finite numbers")
        head = RewardHead(config)
        head.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(f"{path}: a reward head that does not fit its own configuration ({reason})") from None
    return head.eval().to(device)


def _is_zip(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:
        return False  # the reader of heads says what is wrong with it


def _load_published_head(path: Path) -> RewardHead:
    """The head of a published file, which records no configuration: its folder's name tells what it was trained on."""
    from published import NotPublished, read_published_head

    try:
        tensors = read_published_head(path)
    except NotPublished as error:
        raise UserError(f"{path}: expected a reward head, refused: {error}") from None
    folder = path.resolve().parent.name
    parts = folder.split("_baseline_")
    head = RewardHead(
        RewardHeadConfig(
            head="small_model_shrink",
            hidden=tensors.fc1_weight.shape[1],
            encoder=None,
            encoder_is_folder=False,
            max_length=1024,
            context_turns=20,
            stage=1 if "reward_function" in folder else 2,
            reward_class=next((name for name in REWARD_CLASSES if f"_{name}_" in f"{folder}_"), None),
            redist_type=next((name for name in DECOMPOSITIONS if parts[-1].startswith(f"{name}_")), None),
            li=not folder.startswith("baselines_"),
        )
    )
    names = ("layers.0.weight", "layers.0.bias", "layers.3.weight", "layers.3.bias")
    head.load_state_dict(dict(zip(names, tensors, strict=True)))
    return head.eval()


PUBLISHED_ENCODER = "lang_model_devout-brook-114"  # the encoder of the published heads


def encoder_of_head(head: RewardHead, path: str | Path) -> str:
    """The hub id or folder of the encoder that the head at `path` was trained on.

    A published head records none: it is `lang_model_{run}` beside the head, else `PUBLISHED_ENCODER` in one of the
    stage-1 folders beside the head's folder.

    Raises:
        UserError: if a published head's is in neither place.
    """
    config, path = head.config, Path(path)
    if config.encoder is not None:
        if config.encoder_is_folder:
            return os.path.normpath(path.parent / config.encoder)
        return named_by_file(config.encoder, path)
    own = path.parent / f"lang_model_{path.name.removeprefix('reward1_')}"
    found = (
        [own] if own.is_dir() else sorted(path.resolve().parent.parent.glob(f"*reward_function_*/{PUBLISHED_ENCODER}"))
    )
    if len(found) == 1:
        return str(found[0])
    several = f"found {len(found)}: {', '.join(map(str, found))}" if found else "found none"
    raise UserError(
        f"{path}: a published head, which does not record its encoder: expected {PUBLISHED_ENCODER}/ in stage 1's "
        f"folder (SINGLE_INDEX_reward_function_…), {several}; name it with --lang_model_path"
    )


def encoder_reference(encoder: str | Path, head_folder: Path) -> dict:
    """How a head in `head_folder` records its encoder: a folder relative to itself, or a hub id."""
    if Path(encoder).is_dir():
        return {"encoder": os.path.relpath(Path(encoder).resolve(), head_folder.resolve()), "encoder_is_folder": True}
    return {"encoder": str(encoder), "encoder_is_folder": False}


# ---------------------------------------------------------------------------------------------------------------------
# The text encoder


class TokenPair(NamedTuple):
    """A tokenised (context, response): (n,) ids with all special tokens, and how many belong to the first segment."""

    ids: np.ndarray
    first_segment: int


class TurnEncoder(nn.Module):
    """Encodes (context, response) pairs; a turn's representation is the last hidden state at the last end token.

    Args:
        model: a Hugging Face model; of an encoder-decoder only the encoder is ever run.
        tokenizer: its fast tokenizer, whose own pair form is used.
        max_length: tokens a pair; lowered to the encoder's own limit. A longer pair loses the left end of its context,
            and a response that is longer by itself loses its own left end.
        name: where it came from (hub id or folder).
    """

    def __init__(self, model, tokenizer, max_length: int = 1024, name: str = ""):
        super().__init__()
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.max_length = min(max_length, own_limit(model.config, tokenizer))
        self._prefix, self._between, self._suffix, self._between_first = _pair_form(tokenizer)
        self._uses_segments = "token_type_ids" in tokenizer.model_input_names
        self._room = self.max_length - len(self._prefix) - len(self._between) - len(self._suffix)
        if self._room < 1:
            raise UserError(
                f"--max_length {max_length}: at least {self.max_length - self._room + 1} tokens are needed, for the "
                "special tokens and one of text"
            )
        if not self._suffix:
            raise UserError(f"{name}: its tokenizer has neither an end nor a separator token, where a turn is read")
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self._suffix[-1]
        self.tokens_per_batch: int | None = None  # None: by memory
        self.agree: Callable[[int], int] | None = None  # see `sharding.spread`
        self._run: Callable | None = None

    def compile(self) -> None:
        """Runs the encoder through `torch.compile` from now on; what is saved stays the same."""
        self._run = torch.compile(self.encoder, dynamic=True)

    def token_budget(self, gradients: bool = False) -> int:
        """Padded tokens that go through the encoder at once: `tokens_per_batch`, else what a part of this machine's
        memory holds, but no more than is of use. It does not depend on what else is in memory, so results do not."""
        if self.tokens_per_batch:
            return self.tokens_per_batch
        layer = 4 * 24 * self.hidden_size  # bytes a token: activations of a layer, its feed-forward four times as wide
        layers = getattr(self.model.config, "num_hidden_layers", 12) if gradients else 1
        if self.device.type == "cuda":
            memory, most = 0.4 * torch.cuda.get_device_properties(self.device).total_memory, 1 << 18
        else:
            memory = 0.25 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            most = 1 << (15 if gradients else 13)
        fits = int(memory / layer / layers)
        return max(min(fits, most), self.max_length)

    @property
    def encoder(self) -> nn.Module:
        """The part that is run."""
        return self.model.get_encoder() if self.model.config.is_encoder_decoder else self.model

    @property
    def hidden_size(self) -> int:
        """Width of the representation."""
        return self.model.config.hidden_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that training changes: the encoder's (not a decoder's), or its adapter's."""
        return [p for p in self.encoder.parameters() if p.requires_grad]

    def tokenize(self, pairs: Sequence[tuple[str, str]]) -> list[TokenPair]:
        """Token ids of (context, response) pairs, cut to `max_length`; every pair ends in an end token."""
        if not pairs:
            return []
        contexts, responses = (
            self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
            for texts in zip(*pairs, strict=True)
        )
        result = []
        for context, response in zip(contexts, responses, strict=True):
            response = response[-self._room :]
            spare = self._room - len(response)
            context = context[-spare:] if spare else []
            ids = [*self._prefix, *context, *self._between, *response, *self._suffix]
            result.append(
                TokenPair(np.array(ids, dtype=np.int32), len(self._prefix) + len(context) + self._between_first)
            )
        return result

    def collate(self, pairs: Sequence[TokenPair]) -> dict[str, torch.Tensor]:
        """Right-padded model inputs (n, longest) on the encoder's device."""
        longest = max(len(pair.ids) for pair in pairs)
        ids = np.full((len(pairs), longest), self._pad, dtype=np.int64)
        mask = np.zeros((len(pairs), longest), dtype=np.int64)
        segments = np.zeros((len(pairs), longest), dtype=np.int64)
        for row, pair in enumerate(pairs):
            n = len(pair.ids)
            ids[row, :n], mask[row, :n], segments[row, pair.first_segment : n] = pair.ids, 1, 1
        arrays = {"input_ids": ids, "attention_mask": mask}
        if self._uses_segments:
            arrays["token_type_ids"] = segments
        return {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}

    def forward(self, input_ids, attention_mask, **segments) -> torch.Tensor:
        """(n, hidden) representations: the last hidden state at each row's last end token."""
        run = self._run or self.encoder
        hidden = run(input_ids=input_ids, attention_mask=attention_mask, **segments).last_hidden_state
        last = attention_mask.sum(dim=1) - 1  # every pair ends in its end token
        return hidden[torch.arange(len(last), device=hidden.device), last]

    def _features(self, pairs: Sequence[TokenPair], autocast) -> torch.Tensor:
        """(n, hidden) float32 of one pass; it is made, with a pair that says nothing, for no pairs too."""
        blank = TokenPair(np.array(self._suffix[-1:], dtype=np.int32), 1)
        with autocast():
            return self(**self.collate(pairs or [blank])).float()[: len(pairs)]

    def _filled(self, batches: list[np.ndarray], passes: int) -> list[np.ndarray]:
        """`batches`, and empty ones up to as many as there are `passes`."""
        return batches + [np.arange(0)] * (passes - len(batches))

    def encode_with_gradients(self, pairs: Sequence[TokenPair], autocast=nullcontext, parts: int = 1):
        """(n, hidden) float32 representations that gradients flow through.

        What does not fit into memory at once goes through in batches of similar lengths. Of these only the input is
        kept: the backward pass computes them again, with the same dropout, so memory does not grow with n. `parts`: of
        how many such calls the gradients are kept at the same time.
        """
        from torch.utils.checkpoint import checkpoint

        def features(batch):
            return self._features([pairs[i] for i in batch], autocast)

        if not len(pairs) and not self.agree:
            return torch.zeros(0, self.hidden_size)
        lengths = np.array([len(pair.ids) for pair in pairs], dtype=int)
        budget = self.token_budget(gradients=True)
        batches = token_batches(lengths, budget)
        passes = 0 if lengths.max(initial=0) * len(lengths) * parts <= budget else len(batches)
        passes = self.agree(passes) if self.agree else passes
        if not passes:  # all fit at once, in every process
            return features(np.arange(len(pairs)))
        batches = self._filled(batches, passes)
        rows = torch.cat([checkpoint(features, batch, use_reentrant=False) for batch in batches])
        return rows[torch.from_numpy(np.argsort(np.concatenate(batches))).to(rows.device)]

    @torch.no_grad()  # not inference_mode: what comes out may be trained on
    def encode(self, pairs: Sequence[TokenPair], autocast=nullcontext, progress=None, on_batch=None):
        """(n, hidden) float32 representations on the CPU, encoded in eval mode in batches of similar lengths.

        Args:
            pairs: n tokenised pairs. autocast: a context-manager factory. progress: description of a progress bar.
            on_batch: called with the indices of a batch and its features, as soon as there are some.
        """
        from runs import progress_bar

        was_training = self.training
        self.eval()
        features = torch.empty(len(pairs), self.hidden_size)
        lengths = np.array([len(pair.ids) for pair in pairs])
        with progress_bar(total=len(pairs), desc=progress, unit="turn", disable=progress is None) as bar:
            batches = token_batches(lengths, self.token_budget())
            for batch in self._filled(batches, self.agree(len(batches)) if self.agree else len(batches)):
                features[batch] = self._features([pairs[i] for i in batch], autocast).cpu()
                if on_batch:
                    on_batch(batch, features[batch])
                bar.update(len(batch))
        self.train(was_training)
        return features

    def save(self, folder: str | Path) -> None:
        """Writes model and tokenizer as Hugging Face does, atomically; all processes call it together."""
        from runs import atomic_folder
        from sharding import whole_state

        adapted = hasattr(self.model, "peft_config")  # then only the adapter is written, which is never spread
        state = whole_state(self.model) if self.agree and not adapted else None
        with atomic_folder(folder) as temporary:
            self.model.save_pretrained(temporary, state_dict=state)
            self.tokenizer.save_pretrained(temporary)


def load_encoder(
    name: str,
    max_length: int = 1024,
    option: str = "--lang_model_path",
    adapt: bool = False,
    dtype=torch.float32,
    trust_remote_code: bool = False,
) -> TurnEncoder:
    """Loads an encoder from a folder (nothing is looked up elsewhere then) or from the hub; a folder with an adapter
    in it (`adapter_config.json`) brings the model that it adapts.

    Dropout on attention weights is off, which makes training twice as fast on a CPU for encoders that had it (BERT's
    kind); dropout on hidden states stays as the model has it.

    Args:
        adapt: put a fresh LoRA adapter (r=8, alpha=16, dropout 0.1) on it, which is then what trains and is saved.
        dtype: of the weights under an adapter; all other weights are float32.
        trust_remote_code: run code that it brings along.

    Raises:
        UserError: if it cannot be loaded; `option` names what the user gave.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    adapter, base = None, name
    if (Path(name) / "adapter_config.json").is_file():
        adapter = name
        base = named_by_file(recorded_base(name, option), Path(name) / "adapter_config.json")
    tokenizer = load_pretrained(AutoTokenizer, name, option, trust_remote_code)
    config = load_pretrained(AutoConfig, base, option, trust_remote_code)
    for dropout in ("attention_dropout", "attention_probs_dropout_prob"):
        if hasattr(config, dropout):  # BERT's kind has it; with it no fused attention kernel runs on a CPU
            setattr(config, dropout, 0.0)
    if not config.is_encoder_decoder and hasattr(config, "use_cache"):
        config.use_cache = False
    weights = dtype if adapter or adapt else torch.float32
    model = load_pretrained(AutoModel, base, option, trust_remote_code, config=config, dtype=weights)
    check_vocabulary(tokenizer, model, name, option)
    if adapter:
        model = _load_adapter(model, adapter, option)
    elif adapt:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, task_type="FEATURE_EXTRACTION")
        model = get_peft_model(model, lora)
        if Path(base).is_dir():  # the adapter finds it from wherever it is loaded
            model.peft_config["default"].base_model_name_or_path = str(Path(base).resolve())
    return TurnEncoder(model, tokenizer, max_length, name)


def recorded_base(folder: str | Path, option: str) -> str:
    """What the adapter in `folder` says of the model that it is for: a hub id or a folder, which may not be there."""
    base = check_adapter(folder, option).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{option} {folder}: adapter_config.json in it names no base_model_name_or_path")
    return base


def _load_adapter(model, folder: str, option: str):
    """`model` with the adapter that `folder` holds, ready to be trained further."""
    from peft import PeftModel

    from runs import first_line

    try:
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=True)
        _check_adapter_weights(adapted, folder)
    except Exception as error:  # other people's files can fail in any way
        raise UserError(f"{option} {folder}: this adapter could not be loaded: {first_line(error)}") from None
    return adapted


def _check_adapter_weights(model, folder: str | Path) -> dict[str, torch.Tensor]:
    """The weights of the adapter in a folder.

    Raises:
        ValueError: if they are not finite, or not exactly those that the adapter of `model` has (peft leaves what is
            missing as it was, and says nothing).
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    saved, mine = load_file(Path(folder) / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    if {name: tensor.shape for name, tensor in saved.items()} != {name: t.shape for name, t in mine.items()}:
        raise ValueError(f"its {len(saved)} tensors are not the {len(mine)} that this model's adapter has")
    if not all(torch.isfinite(tensor).all() for tensor in saved.values()):
        raise ValueError("weights that are not finite")
    return saved


def quiet_transformers() -> None:
    """No progress bars for reading a file, and no advice that only the library's own developers can act on."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_encoder_of_head(
    head: RewardHead,
    path: str | Path,
    max_length: int,
    named: str | None,
    dtype=torch.float32,
    trust_remote_code: bool = False,
) -> TurnEncoder:
    """The encoder that the head at `path` was trained on; says so where the user `named` another. Of a published head,
    which records none, it is the named one.

    Raises:
        UserError: if it cannot be loaded or does not fit the head.
    """
    if named and head.config.encoder is None:
        name = named
    else:
        name = encoder_of_head(head, path)
        if named and Path(named).resolve() != Path(name).resolve():
            print(f"--lang_model_path {named} is not used: {path} was trained on {name}, which is loaded instead")
        if head.config.encoder_is_folder and not Path(name).is_dir():  # and is not looked for on the hub
            raise UserError(f"{path}: expected the encoder that it was trained on in {name}, found no such folder")
    option = f"the encoder that {path} was trained on,"
    encoder = load_encoder(name, max_length, option, dtype=dtype, trust_remote_code=trust_remote_code)
    if encoder.hidden_size != head.config.hidden:
        raise UserError(f"{path}: takes {head.config.hidden} features, its encoder {name} gives {encoder.hidden_size}")
    return encoder


def load_pretrained(auto_class, name: str, option: str, trust_remote_code: bool = False, config=None, **arguments):
    """`auto_class.from_pretrained(name)`, offline when `name` is a folder; checked first (see `untrusted.py`).

    Args:
        trust_remote_code: run code that the model brings along; without, such a model is refused.
        config: of a model (as against a tokenizer or a configuration), its configuration.

    Raises:
        UserError: if it is refused or cannot be loaded, or some of its weights are missing.
    """
    from transformers import AutoModel

    from runs import first_line

    quiet_transformers()
    local = Path(name).is_dir()
    check_model(name, option, trust_remote_code)
    missing = []
    try:
        if config is not None:
            arguments |= {"config": config, "output_loading_info": True}
            if local and (Path(name) / "adapter_config.json").is_file():  # it would bring a model from elsewhere
                raise UserError(f"{option} {name}: expected a whole model, found an adapter (adapter_config.json)")
            if local and not trust_remote_code:
                check_size(auto_class, name, option, config)
        loaded = auto_class.from_pretrained(
            name, local_files_only=local, trust_remote_code=trust_remote_code, **arguments
        )
        if config is not None:
            loaded, info = loaded
            missing = [key for key in info["missing_keys"] if "pooler" not in key]
            if auto_class is AutoModel:  # of which the encoder alone is run
                missing = [key for key in missing if not key.startswith("decoder.")]
    except UserError:
        raise
    except UnpicklingError:  # torch's own words for it advise to run them
        raise UserError(
            f"{option} {name}: its pickled weights hold more than tensors; nothing of them was run; expected "
            "model.safetensors, or a .bin file of tensors alone"
        ) from None
    except Exception as error:  # other people's files can fail in any way
        reason = first_line(error) if not first_line(error).endswith(":") else one_line(str(error))[:200]
        what = "folder" if local else "hub id (and no folder of that name is here)"
        raise UserError(f"{option} {name}: this {what} could not be loaded: {reason}") from None
    if missing:
        raise UserError(
            f"{option} {name}: its weights lack {len(missing)} that its config.json asks for, such as {min(missing)}"
        )
    return loaded


def own_limit(config, tokenizer) -> int:
    """Tokens that the encoder can take: its position table (less RoBERTa's padding offset), where it has one."""
    limits = [1 << 20]
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        offset = config.pad_token_id + 1 if config.model_type in ("roberta", "longformer", "xlm-roberta") else 0
        limits.append(positions - offset)
    if tokenizer.model_max_length and tokenizer.model_max_length < 1 << 20:
        limits.append(tokenizer.model_max_length)
    return min(limits)


def _pair_form(tokenizer) -> tuple[list[int], list[int], list[int], int]:
    """The special tokens that a tokenizer puts before, between and behind a pair, and how many of those between belong
    to the first segment. An end token is added where the tokenizer puts none."""
    encoded = tokenizer("a", "b", return_token_type_ids=True)
    ids, parts = encoded["input_ids"], encoded.sequence_ids(0)
    segments = encoded.get("token_type_ids") or [0] * len(ids)
    first = [i for i, part in enumerate(parts) if part == 0]
    second = [i for i, part in enumerate(parts) if part == 1]
    between = range(first[-1] + 1, second[0])
    suffix = ids[second[-1] + 1 :]
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if not suffix and end is not None:
        suffix = [end]
    return ids[: first[0]], [ids[i] for i in between], suffix, sum(segments[i] == 0 for i in between)


# ---------------------------------------------------------------------------------------------------------------------
# PPO: pure functions. Shapes: n responses, R token positions; `mask` (n, R) is 1 where a token is kept, 0 on padding
# and behind the cut, and such places must not matter.


def whiten(values: torch.Tensor, mask: torch.Tensor, mean: float, variance: float) -> torch.Tensor:
    """`values` shifted and scaled to mean 0 and variance 1, where they have this mean and variance over all kept places
    (of all processes); 0 where not kept."""
    return (values - mean) * (variance + 1e-8) ** -0.5 * mask


def token_rewards(score: torch.Tensor, logprobs, ref_logprobs, mask, beta: float) -> torch.Tensor:
    """Reward of every token: -beta (log pi - log pi_ref), an unbiased estimate of the KL penalty under pi's own
    samples, and the response's score on its last kept token.

    Args:
        score: (n,). logprobs, ref_logprobs, mask: (n, R). beta: weight of the KL.

    Returns:
        (n, R), 0 where not kept.
    """
    rewards = -beta * (logprobs - ref_logprobs) * mask
    last = mask.sum(dim=1).long() - 1
    rewards[torch.arange(len(score)), last] += score
    return rewards


def gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float):
    """Generalized advantage estimation (Schulman et al., 2016, eq. 16): A_t = sum_l (gamma lam)^l delta_{t+l} with
    delta_t = r_t + gamma V_{t+1} - V_t, and V = 0 behind the last kept token.

    Args:
        rewards, values, mask: (n, R), kept places first.

    Returns:
        Advantages and returns (advantages + values), (n, R) each, 0 where not kept.
    """
    values, rewards = values * mask, rewards * mask
    advantages, running = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        following = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(running)
        running = (rewards[:, t] + gamma * following - values[:, t] + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


def ppo_loss(logprobs, values, old_logprobs, old_values, advantages, returns, mask, clip, value_clip, tokens=None):
    """Clipped policy and value losses (Schulman et al., 2017, eq. 7 and 9).

    Args:
        logprobs, values: (n, R) of the policy that is updated; the `old_` ones are the rollout's.
        advantages, returns, mask: (n, R).
        clip: of the ratio around 1. value_clip: of the value around the old one.
        tokens: what sums are divided by (the kept tokens of the whole optimizer step, so that accumulated gradients
            equal one large batch's); by default the kept tokens here.

    Returns:
        policy loss (), value loss (), and a dict of detached sums over kept tokens: approx_kl, policy_clipped,
        value_clipped, ratio.
    """
    tokens = mask.sum() if tokens is None else tokens
    log_ratio = (logprobs - old_logprobs) * mask
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    policy = (torch.maximum(unclipped, clipped) * mask).sum() / tokens
    bounded = old_values + (values - old_values).clamp(-value_clip, value_clip)
    errors, bounded_errors = (values - returns) ** 2, (bounded - returns) ** 2
    value = 0.5 * (torch.maximum(errors, bounded_errors) * mask).sum() / tokens
    with torch.no_grad():
        sums = {
            "approx_kl": (0.5 * log_ratio**2).sum(),
            "policy_clipped": ((clipped > unclipped) * mask).sum(),
            "value_clipped": ((bounded_errors > errors) * mask).sum(),
            "ratio": (ratio * mask).sum(),
        }
    return policy, value, sums


class AdaptiveKL:
    """beta of the KL penalty, moved towards `target` (Ziegler et al., 2019, section 2.2).

    Args:
        beta: start. target: nats a response. horizon: responses over which a full error multiplies beta by e^0.2.
    """

    def __init__(self, beta: float, target: float, horizon: float):
        self.beta, self.target, self.horizon = beta, target, horizon

    def update(self, kl: float, n: int) -> None:
        """After a batch of `n` responses of mean KL `kl`."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + error * n / self.horizon


class RunningMoments:
    """Mean and standard deviation of everything seen so far (Chan et al.'s parallel update)."""

    def __init__(self):
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    @property
    def std(self) -> float:
        """Population standard deviation; 1 before there are two different values."""
        return (self._squares / self.count) ** 0.5 if self._squares > 0 else 1.0

    def normalize(self, values: torch.Tensor) -> torch.Tensor:
        """Takes `values` (n,) in, and returns them normalised by the moments that include them."""
        n, mean = len(values), values.double().mean().item()
        squares = ((values.double() - mean) ** 2).sum().item()
        total, shift = self.count + n, mean - self.mean
        self._squares += squares + shift**2 * self.count * n / total
        self.mean += shift * n / total
        self.count = total
        return (values - self.mean) / (self.std + 1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# The policy


MAX_NEW_TOKENS = 128  # the longest response
DONE_EVERY = 4  # tokens between two looks at whether a response has gone on long enough


class Policy(nn.Module):
    """A LoRA-adapted language model with a value head; the reference policy is the same network, adapter off.

    Args:
        model: a `peft.PeftModel` around a causal language model or an encoder-decoder. tokenizer: its tokenizer.

    Raises:
        UserError: if the model computes its logits in a way that is not known here.
    """

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.has_encoder = bool(model.config.is_encoder_decoder)
        self.agree: Callable[[int], int] | None = None  # see `sharding.spread`
        # starts at 0: the value of nothing learned yet
        self.value_head = nn.Linear(model.config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.eval()  # and so it stays: dropout would make the rollout's and the update's probabilities differ
        self._check_logits()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.value_head.weight.device

    @property
    def max_prompt_tokens(self) -> int:
        """What the position table leaves for a prompt: of a causal model, with room for the longest response."""
        positions = getattr(self.model.config, "max_position_embeddings", None) or 1 << 20
        return positions if self.has_encoder else positions - MAX_NEW_TOKENS

    def trainable(self) -> list[nn.Parameter]:
        """The adapter's and the value head's parameters."""
        return [p for p in self.parameters() if p.requires_grad]

    def reference(self):
        """Context manager: the adapter is off."""
        return self.model.disable_adapter()

    def tokenize(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Padded ids and mask (n, Q): on the left for a causal model, whose response follows, on the right for an
        encoder. A prompt that is too long loses what follows its instruction."""
        limit, instruction = self.max_prompt_tokens, self.tokenizer(INSTRUCTION)["input_ids"]
        encoded = []
        for tokens in self.tokenizer(list(prompts), verbose=False)["input_ids"]:
            if len(tokens) > limit:
                kept = min(
                    sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(instruction, tokens, strict=False))),
                    limit - 1,
                )
                tokens = [*tokens[:kept], *tokens[kept - limit :]]
            encoded.append(tokens)
        longest = max(map(len, encoded))
        ids = torch.full((len(encoded), longest), self.pad)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(encoded):
            place = slice(len(tokens)) if self.has_encoder else slice(longest - len(tokens), longest)
            ids[row, place] = torch.tensor(tokens)
            mask[row, place] = 1
        return ids.to(self.device), mask.to(self.device)

    @property
    def end(self) -> int:
        """The end token."""
        return self.tokenizer.eos_token_id

    @property
    def pad(self) -> int:
        """The padding token; what it is does not matter, because masks say where it is."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end

    @torch.no_grad()
    def generate(self, query: torch.Tensor, query_mask: torch.Tensor, uniforms: torch.Tensor, done=None):
        """Samples responses at temperature 1 from the whole distribution, until all have ended.

        Args:
            query, query_mask: (n, Q) as `tokenize` gives them.
            uniforms: (n, r) in [0, 1): what chooses each of at most r tokens, so that a response does not depend on who
                else is in the batch.
            done: responses so far (n, r) -> (n,) which need not go on; asked now and then.

        Returns:
            (n, R) ids, padded behind the end token (or where `done` said so), and (n, R, hidden) the states that they
            were drawn from, which `read` takes.
        """
        base, uniforms = self.model.get_base_model(), uniforms.to(query.device, torch.float64)
        mask, inputs = query_mask, query
        cache = None if self.has_encoder else _roomy_cache(base.config, uniforms.shape[1])
        if self.has_encoder:
            encoded = base.get_encoder()(input_ids=query, attention_mask=query_mask).last_hidden_state
            inputs = torch.full_like(query[:, :1], base.config.decoder_start_token_id)
        else:
            body, positions = getattr(base, base.base_model_prefix), (mask.cumsum(dim=1) - 1).clamp(min=0)
        response = torch.empty(len(query), 0, dtype=torch.long, device=query.device)
        ended, states = torch.zeros(len(query), dtype=torch.bool, device=query.device), []
        for step in range(1, uniforms.shape[1] + 1):
            if self.has_encoder:
                output = base.get_decoder()(
                    input_ids=inputs, encoder_hidden_states=encoded, encoder_attention_mask=mask, past_key_values=cache,
                    use_cache=True,
                )  # fmt: skip
            else:
                output = body(
                    input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
                )
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                positions = positions[:, -1:] + 1
            cache, state = output.past_key_values, output.last_hidden_state[:, -1]
            reached = self._logits(state).double().softmax(dim=-1).cumsum(dim=-1)  # inverse transform sampling
            goal = uniforms[:, step - 1 : step] * reached[:, -1:]
            token = torch.searchsorted(reached, goal, right=True).squeeze(1).clamp(max=reached.shape[1] - 1)
            token = token.masked_fill(ended, self.pad)
            inputs = token[:, None]
            response = torch.cat([response, inputs], dim=1)
            states.append(state)
            ended |= token == self.end
            if done and step % DONE_EVERY == 0:
                ended |= done(response).to(ended.device)
            going = int(not ended.all())
            if not (self.agree(going) if self.agree else going):
                break
        return response, torch.stack(states, dim=1)

    def forward(self, query, query_mask, response, response_mask):
        """Log-probability of every response token, the value of the state before it, and the entropy there.

        Only the kept response positions get logits.

        Args:
            query, query_mask: (n, Q) padded as `tokenize` does. response, response_mask: (n, R) right-padded.

        Returns:
            logprobs, values, entropies: (n, R) float32, 0 where not kept.
        """
        return self.read(self._states(query, query_mask, response, response_mask), response, response_mask)

    def read(self, hidden: torch.Tensor, response: torch.Tensor, response_mask: torch.Tensor):
        """As `forward`, from the (n, R, hidden) states before each response token."""
        kept = response_mask.bool()
        states, tokens = hidden[kept], response[kept]
        logprobs, entropies = _token_logprobs(self._logits, self.model.config.vocab_size, states, tokens)
        values = self.value_head(states.to(self.value_head.weight.dtype)).squeeze(1)
        blank = torch.zeros(response.shape, device=response.device)
        return tuple(blank.masked_scatter(kept, x.float()) for x in (logprobs, values, entropies))

    def _states(self, query, query_mask, response, response_mask) -> torch.Tensor:
        """(n, R, hidden) the last hidden state before each response token; a pass is made for n = 0 too."""
        if not len(query):
            blank = response.new_full((1, response.shape[1]), self.end)
            ones = torch.ones_like(blank)
            return self._states(blank[:, :1], ones[:, :1], blank, ones)[:0]
        base = self.model.get_base_model()
        if self.has_encoder:
            encoded = base.get_encoder()(input_ids=query, attention_mask=query_mask).last_hidden_state
            start = torch.full_like(response[:, :1], base.config.decoder_start_token_id)
            return base.get_decoder()(
                input_ids=torch.cat([start, response[:, :-1]], dim=1),
                encoder_hidden_states=encoded,
                encoder_attention_mask=query_mask,
                use_cache=False,
            ).last_hidden_state
        ids = torch.cat([query, response], dim=1)
        mask = torch.cat([query_mask, response_mask.to(query_mask.dtype)], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        body = getattr(base, base.base_model_prefix)
        hidden = body(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        return hidden[:, query.shape[1] - 1 : -1]

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        """(m, vocabulary) of states (m, hidden), as the whole model makes them."""
        base = self.model.get_base_model()
        if getattr(base.config, "scale_decoder_outputs", False):  # T5 with tied embeddings
            states = states * base.config.d_model**-0.5
        logits = base.get_output_embeddings()(states)
        bias = getattr(base, "final_logits_bias", None)  # BART's kind
        return logits if bias is None else logits + bias

    @torch.no_grad()
    def _check_logits(self) -> None:
        query = torch.tensor([[self.end, self.end]], device=self.device)
        mask, response = torch.ones_like(query), query[:, :1]
        if self.has_encoder:
            start = torch.full_like(response, self.model.config.decoder_start_token_id)
            expected = self.model(input_ids=query, attention_mask=mask, decoder_input_ids=start).logits[:, -1]
        else:
            expected = self.model(input_ids=query, attention_mask=mask).logits[:, -1]
        found = self._logits(self._states(query, mask, response, torch.ones_like(response))[:, 0])
        if not torch.allclose(found.float(), expected.float(), atol=0.05, rtol=0.02):
            raise UserError(
                f"--model_name: a model of the kind {self.model.config.model_type} changes its logits after its last "
                "layer in a way that this program does not know; choose another policy"
            )

    def save(self, folder: str | Path) -> None:
        """Writes a PEFT adapter with its tokenizer and `value_head.safetensors`, atomically."""
        from safetensors.torch import save_file

        from runs import atomic_folder

        with atomic_folder(folder) as temporary:
            self.model.save_pretrained(temporary, save_embedding_layers=False)
            self.tokenizer.save_pretrained(temporary)
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in self.value_head.state_dict().items()},
                temporary / "value_head.safetensors",
            )

    def save_merged(self, folder: str | Path) -> None:
        """Writes the whole model, the adapter merged into its weights, with its tokenizer, atomically. The policy ends
        with it: its memory is given back."""
        from runs import atomic_folder, is_writer

        merged = self.model.merge_and_unload()
        if is_writer():  # gigabytes: not once a process
            with atomic_folder(folder) as temporary:
                merged.save_pretrained(temporary)
                self.tokenizer.save_pretrained(temporary)
        self.to("meta")

    def load(self, folder: str | Path) -> None:
        """Reads the adapter and the value head that `save` wrote into this policy.

        Raises:
            UserError: if they do not fit this policy.
        """
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        from runs import first_line

        saved, mine = check_adapter(folder, "the policy's checkpoint"), self.model.peft_config["default"]
        if saved["r"] != mine.r:
            raise UserError(f"{folder}: an adapter of rank {saved['r']}, the options ask for {mine.r} (see --no_accel)")
        base = saved.get("base_model_name_or_path")
        if base != mine.base_model_name_or_path:
            print(f"Warning: {folder} was trained on {base!r}, --model_name is {mine.base_model_name_or_path}")
        try:
            set_peft_model_state_dict(self.model, _check_adapter_weights(self.model, folder))
            value_head = load_file(Path(folder) / "value_head.safetensors")
            if not all(torch.isfinite(tensor).all() for tensor in value_head.values()):
                raise ValueError("a value head that is not finite")
            self.value_head.load_state_dict(value_head)
        except Exception as error:  # other people's files can fail in any way
            raise UserError(f"{folder}: not an adapter that fits this policy ({first_line(error)})") from None


def _roomy_cache(config, room: int):
    """A key-value cache with room for `room` tokens behind the prompt; the library's own copies itself a token."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class RoomyLayer(DynamicLayer):
        def update(self, keys, values, *_, **__):
            done, end = self.get_seq_length(), self.get_seq_length() + keys.shape[-2]
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
                self._all = [new.new_empty(*new.shape[:-2], end + room, new.shape[-1]) for new in (keys, values)]
            for whole, new in zip(self._all, (keys, values), strict=True):
                whole[..., done:end, :] = new
            self.keys, self.values = (whole[..., :end, :] for whole in self._all)
            return self.keys, self.values

    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


LOGITS_PER_CHUNK = 1 << 25  # 128 MiB of float32


def _token_logprobs(logits_of: Callable, vocabulary: int, states: torch.Tensor, tokens: torch.Tensor):
    """(m,) log-probabilities of `tokens` (m,) and (m,) entropies, from (m, hidden) states, a chunk at a time."""

    def chunk(part, chosen):
        log_p = logits_of(part).float().log_softmax(dim=-1)
        return log_p.gather(1, chosen[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(dim=1)

    size = max(1, LOGITS_PER_CHUNK // vocabulary)
    parts = [chunk(states[i : i + size], tokens[i : i + size]) for i in range(0, max(len(states), 1), size)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def load_policy(name: str, rank: int, alpha: int, dtype: torch.dtype, trust_remote_code: bool = False) -> Policy:
    """A policy around the model `name` (hub id or folder) with a fresh adapter, which changes nothing yet.

    Args:
        rank, alpha: of LoRA (Hu et al., 2022). dtype: of the frozen weights; the adapter is float32.
        trust_remote_code: run code that it brings along.

    Raises:
        UserError: if the model cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, name, "--model_name", trust_remote_code)
    config = load_pretrained(AutoConfig, name, "--model_name", trust_remote_code)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = load_pretrained(kind, name, "--model_name", trust_remote_code, config=config, dtype=dtype)
    check_vocabulary(tokenizer, model, name, "--model_name")
    return adapt_policy(model, tokenizer, rank, alpha)


def adapt_policy(model, tokenizer, rank: int, alpha: int) -> Policy:
    """A policy around a language model, with a fresh LoRA adapter of this rank and alpha (Hu et al., 2022)."""
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    config = model.config
    attention = {"q_proj", "v_proj"} if any(n.endswith("q_proj") for n, _ in model.named_modules()) else "all-linear"
    adapter = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.05,
        task_type="SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM",
        target_modules=None if config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING else attention,
        fan_in_fan_out=config.model_type == "gpt2",  # its layers keep their weights transposed
    )
    return Policy(get_peft_model(model, adapter), tokenizer)
