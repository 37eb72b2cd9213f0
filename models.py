"""The text encoder, the reward heads, and the losses of reward training and of PPO.

The losses are pure functions of tensors; the loops that call them are in the entry scripts and in `ppo.py`.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from cli import UserError
from data_utils import INSTRUCTION, token_batches

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


class Decomposition(NamedTuple):
    """A way to train turn rewards from one score.

    Attributes:
        loss: (rewards (k,), score, length) -> () loss to train on.
        uses_subset: whether it is estimated on K random turns (else on all).
    """

    loss: Callable[[torch.Tensor, float, float], torch.Tensor]
    uses_subset: bool


DECOMPOSITIONS = {
    "RRD": Decomposition(rrd_loss, uses_subset=True),
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
        encoder: the encoder that it was trained on: a hub id, or a folder relative to the head's file.
        encoder_is_folder: which of the two.
        max_length, context_turns: how its input text was cut.
        stage: 1 or 2. reward_class: the score. redist_type: the decomposition (stage 2). li: trained with LI.
    """

    head: str
    hidden: int
    encoder: str
    encoder_is_folder: bool
    max_length: int
    context_turns: int
    stage: int
    reward_class: str
    redist_type: str | None = None
    li: bool = True


def shrink_head(hidden: int) -> nn.Sequential:
    """`--small_model_shrink`: h-128-1 with ReLU, dropout 0.2 after each linear layer, tanh at the end."""
    return nn.Sequential(
        nn.Linear(hidden, 128), nn.Dropout(0.2), nn.ReLU(), nn.Linear(128, 1), nn.Dropout(0.2), nn.Tanh()
    )


def default_head(hidden: int) -> nn.Sequential:
    """h-768-128-32-1 with ReLU between the layers."""
    return _relu_stack(hidden, 768, 128, 32, 1)


def _relu_stack(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(widths)):
        layers += [nn.ReLU()] * (i > 0) + [nn.Linear(before, after)]
    return nn.Sequential(*layers)


HEADS = {"default": default_head, "small_model_shrink": shrink_head}


class RewardHead(nn.Module):
    """r_theta on top of the encoder: (n, hidden) -> (n, 1). `config` is a `RewardHeadConfig`."""

    def __init__(self, config: RewardHeadConfig):
        super().__init__()
        self.config = config
        self.layers = HEADS[config.head](config.hidden)

    @torch.no_grad()
    def start_at(self, reward: float) -> None:
        """Sets the last bias so that an untrained head predicts about `reward`, in (-1, 1), everywhere.

        Else training spends its first steps, at stage 1's learning rate most of them, on bending the features until
        they give the targets' mean.
        """
        last = [layer for layer in self.layers if isinstance(layer, nn.Linear)][-1]
        bounded = isinstance(self.layers[-1], nn.Tanh)
        last.bias.fill_(math.atanh(reward) if bounded else reward)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Rewards (n, 1) of turns with `features` (n, hidden)."""
        return self.layers(features)


_HEAD_FORMAT = "geli-reward-head-1"


def save_reward_head(head: RewardHead, path: str | Path) -> None:
    """Writes one safetensors file with the head's configuration in its metadata, atomically."""
    from safetensors.torch import save_file

    from runs import atomic_path

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={"format": _HEAD_FORMAT, "config": json.dumps(asdict(head.config))})


def load_reward_head(path: str | Path, device: str | torch.device = "cpu") -> RewardHead:
    """Reads a saved head (`reward1_{run}`).

    Returns:
        An eval-mode module mapping features (n, hidden) to rewards (n, 1); its `config` says what it was trained on.

    Raises:
        UserError: if the file is missing or is no reward head.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
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
    if metadata.get("format") != _HEAD_FORMAT:
        raise UserError(f"{path}: a safetensors file, but not a reward head: its metadata has no format {_HEAD_FORMAT}")
    try:
        known = {field.name for field in fields(RewardHeadConfig)}
        config = RewardHeadConfig(**{k: v for k, v in json.loads(metadata["config"]).items() if k in known})
        head = RewardHead(config)
        head.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: a reward head that does not fit its own configuration ({error})") from None
    return head.eval().to(device)


def encoder_of_head(head: RewardHead, path: str | Path) -> str:
    """The hub id or folder of the encoder that the head at `path` was trained on."""
    config = head.config
    return os.path.normpath(Path(path).parent / config.encoder) if config.encoder_is_folder else config.encoder


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
        self.max_length = min(max_length, _own_limit(model.config, tokenizer))
        self._prefix, self._between, self._suffix, self._between_first = _pair_form(tokenizer)
        self._uses_segments = "token_type_ids" in tokenizer.model_input_names
        self._room = self.max_length - len(self._prefix) - len(self._between) - len(self._suffix)
        if self._room < 1:
            raise UserError(
                f"--max_length {max_length}: at least {self.max_length - self._room + 1} tokens are needed, for the "
                "special tokens and one of text"
            )
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self._suffix[-1]

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
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **segments).last_hidden_state
        last = attention_mask.sum(dim=1) - 1  # every pair ends in its end token
        return hidden[torch.arange(len(last), device=hidden.device), last]

    @torch.no_grad()  # not inference_mode: what comes out may be trained on
    def encode(self, pairs: Sequence[TokenPair], autocast=nullcontext, tokens_per_batch: int = 16384, progress=None):
        """(n, hidden) float32 representations on the CPU, encoded in eval mode in batches of similar lengths.

        Args:
            pairs: n tokenised pairs. autocast: a context-manager factory. progress: description of a progress bar.
        """
        from runs import progress_bar

        was_training = self.training
        self.eval()
        features = torch.empty(len(pairs), self.hidden_size)
        lengths = np.array([len(pair.ids) for pair in pairs])
        with progress_bar(total=len(pairs), desc=progress, unit="turn", disable=progress is None) as bar:
            for batch in token_batches(lengths, tokens_per_batch):
                with autocast():
                    features[batch] = self(**self.collate([pairs[i] for i in batch])).float().cpu()
                bar.update(len(batch))
        self.train(was_training)
        return features

    def save(self, folder: str | Path) -> None:
        """Writes model and tokenizer as Hugging Face does, atomically."""
        from runs import atomic_folder

        with atomic_folder(folder) as temporary:
            self.model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)


def load_encoder(name: str, max_length: int = 1024, option: str = "--lang_model_path") -> TurnEncoder:
    """Loads an encoder from a folder (nothing is looked up elsewhere then) or from the hub.

    Dropout on attention weights is off, which makes training twice as fast on a CPU for encoders that had it (BERT's
    kind); dropout on hidden states stays as the model has it.

    Raises:
        UserError: if it cannot be loaded; `option` names what the user gave.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, name, option)
    config = load_pretrained(AutoConfig, name, option)
    for dropout in ("attention_dropout", "attention_probs_dropout_prob"):
        if hasattr(config, dropout):  # BERT's kind has it; with it no fused attention kernel runs on a CPU
            setattr(config, dropout, 0.0)
    model = load_pretrained(AutoModel, name, option, config=config, dtype=torch.float32)
    return TurnEncoder(model, tokenizer, max_length, name)


def quiet_transformers() -> None:
    """No progress bars for reading a file, and no advice that only the library's own developers can act on."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_encoder_of_head(head: RewardHead, path: str | Path, max_length: int, named: str | None) -> TurnEncoder:
    """The encoder that the head at `path` was trained on; says so where the user `named` another.

    Raises:
        UserError: if it cannot be loaded or does not fit the head.
    """
    name = encoder_of_head(head, path)
    if named and Path(named).resolve() != Path(name).resolve():
        print(
            f"--lang_model_path {named} is not used: {path} was trained on the encoder {name}, which is loaded instead"
        )
    encoder = load_encoder(name, max_length, f"the encoder that {path} was trained on,")
    if encoder.hidden_size != head.config.hidden:
        raise UserError(f"{path}: takes {head.config.hidden} features, its encoder {name} gives {encoder.hidden_size}")
    return encoder


def load_pretrained(auto_class, name: str, option: str, **arguments):
    """`auto_class.from_pretrained(name)`, offline when `name` is a folder; no code of the model's own is run.

    Raises:
        UserError: if it cannot be loaded.
    """
    from safetensors import SafetensorError

    from runs import first_line

    quiet_transformers()
    local = Path(name).is_dir()
    try:
        return auto_class.from_pretrained(name, local_files_only=local, trust_remote_code=False, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = first_line(error)
        what = "folder" if local else "hub id (and no folder of that name is here)"
        raise UserError(f"{option} {name}: this {what} could not be loaded: {reason}") from None


def _own_limit(config, tokenizer) -> int:
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


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `values` where `mask` is 1."""
    return (values * mask).sum() / mask.sum()


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`values` shifted and scaled to mean 0 and variance 1 over the kept places; 0 elsewhere."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


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


class Policy(nn.Module):
    """A LoRA-adapted causal language model with a value head; the reference policy is the same network, adapter off.

    Args:
        model: a `peft.PeftModel` around a causal language model. tokenizer: its tokenizer.
    """

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        # starts at 0: the value of nothing learned yet
        self.value_head = nn.Linear(model.config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.eval()  # and so it stays: dropout would make the rollout's and the update's probabilities differ

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.value_head.weight.device

    @property
    def max_prompt_tokens(self) -> int:
        """What the position table leaves for a prompt, with room for the longest response."""
        return getattr(self.model.config, "max_position_embeddings", 1 << 20) - MAX_NEW_TOKENS

    def trainable(self) -> list[nn.Parameter]:
        """The adapter's and the value head's parameters."""
        return [p for p in self.parameters() if p.requires_grad]

    def reference(self):
        """Context manager: the adapter is off."""
        return self.model.disable_adapter()

    def tokenize(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded ids and mask (n, Q); a prompt that is too long loses what follows its instruction."""
        limit, instruction = self.max_prompt_tokens, len(self.tokenizer(INSTRUCTION)["input_ids"])
        encoded = [
            tokens if len(tokens) <= limit else [*tokens[:instruction], *tokens[instruction - limit :]]
            for tokens in self.tokenizer(list(prompts), verbose=False)["input_ids"]
        ]
        longest = max(map(len, encoded))
        ids = torch.full((len(encoded), longest), self.pad)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(encoded):
            ids[row, longest - len(tokens) :] = torch.tensor(tokens)
            mask[row, longest - len(tokens) :] = 1
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
    def generate(self, ids: torch.Tensor, mask: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """Samples responses at temperature 1 from the whole distribution: (n, R) ids, padded behind the end token."""
        from transformers import GenerationConfig

        config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=self.end,
            pad_token_id=self.pad,
        )
        # so explicit because whatever is left out comes from the model's own generation_config
        output = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return output[:, ids.shape[1] :]

    def forward(self, query, query_mask, response, response_mask):
        """Log-probability of every response token, the value of the state before it, and the entropy there.

        Only the kept response positions get logits.

        Args:
            query, query_mask: (n, Q) left-padded. response, response_mask: (n, R) right-padded.

        Returns:
            logprobs, values, entropies: (n, R) float32, 0 where not kept.
        """
        ids = torch.cat([query, response], dim=1)
        mask = torch.cat([query_mask, response_mask.to(query_mask.dtype)], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        base = self.model.get_base_model()
        body = getattr(base, base.base_model_prefix)
        hidden = body(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        hidden = hidden[:, query.shape[1] - 1 : -1]  # the state before each response token
        kept = response_mask.bool()
        states, tokens = hidden[kept], response[kept]
        logprobs, entropies = _token_logprobs(base.get_output_embeddings(), states, tokens)
        values = self.value_head(states.to(self.value_head.weight.dtype)).squeeze(1)
        blank = torch.zeros(response.shape, device=response.device)
        return tuple(blank.masked_scatter(kept, x.float()) for x in (logprobs, values, entropies))

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

    def load(self, folder: str | Path) -> None:
        """Reads the adapter and the value head that `save` wrote into this policy.

        Raises:
            UserError: if they do not fit this policy.
        """
        from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from runs import first_line

        try:
            rank, mine = PeftConfig.from_pretrained(str(folder)).r, self.model.peft_config["default"].r
            if rank != mine:
                raise UserError(f"{folder}: an adapter of rank {rank}, the options ask for {mine} (see --no_accel)")
            set_peft_model_state_dict(self.model, load_peft_weights(str(folder), device=str(self.device)))
            self.value_head.load_state_dict(load_file(Path(folder) / "value_head.safetensors"))
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: not an adapter that fits this policy ({first_line(error)})") from None


LOGITS_PER_CHUNK = 1 << 25  # 128 MiB of float32


def _token_logprobs(head: nn.Module, states: torch.Tensor, tokens: torch.Tensor):
    """(m,) log-probabilities of `tokens` (m,) and (m,) entropies, from (m, hidden) states, a chunk at a time."""

    def chunk(part, chosen):
        log_p = head(part).float().log_softmax(dim=-1)
        return log_p.gather(1, chosen[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(dim=1)

    size = max(1, LOGITS_PER_CHUNK // head.weight.shape[0])
    parts = [chunk(states[i : i + size], tokens[i : i + size]) for i in range(0, len(states), size)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def load_policy(name: str, rank: int, alpha: int, dtype: torch.dtype) -> Policy:
    """A policy around the model `name` (hub id or folder) with a fresh adapter, which changes nothing yet.

    Args:
        rank, alpha: of LoRA (Hu et al., 2022). dtype: of the frozen weights; the adapter is float32.

    Raises:
        UserError: if the model cannot be loaded.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, name, "--model_name")
    model = load_pretrained(AutoModelForCausalLM, name, "--model_name", dtype=dtype)
    adapter = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.05, task_type="CAUSAL_LM")
    return Policy(get_peft_model(model, adapter), tokenizer)
