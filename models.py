"""The paper in code: losses of reward training, reward heads, and PPO.

The losses are pure functions of tensors. The reward of turn t is r_t = r_theta(s_t, a_t): a head on top of a text
encoder that reads the dialogue so far (the state s_t) and the agent's turn (the action a_t).
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, make_dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, NamedTuple, get_args

import numpy as np
import torch
from torch import nn

from data_utils import LI_SIGNALS, SignalOptions, TurnSet
from geli.data.questions import QUESTIONS
from geli.nets.options import MAX_NEW_TOKENS
from geli.nets.prompts import Prompt
from geli.rl.critic import RidgeCritic
from geli.rl.rollout import (
    Rollout,
    distinct,
    draw_length,
    draw_uniforms,
    ended_themselves,
    logprobs_and_values,
    minibatches,
    rollout,
)
from geli.run.distributed import gather_parts, local_part
from geli.run.errors import UserError
from geli.run.gradients import NotFinite, apply_gradients
from geli.run.options import episode_length, fraction, non_negative_float, option, positive_float, positive_int

# ---------------------------------------------------------------------------------------------------------------------
# Losses of reward training
#
# `rewards` (k,) are r_t of some turns of a trajectory, `score` is its R in points, and `length` its L in turns.


def predicted_return(rewards: torch.Tensor, length: float) -> torch.Tensor:
    """() R_GE in points, the return estimated from the rewards of a subset I of the turns: (L/|I|) sum_{t in I} r_t."""
    return length * rewards.mean()


def rrd_loss(rewards: torch.Tensor, score: float, length: float) -> torch.Tensor:
    """Randomized return decomposition (Ren et al., ICLR 2022, eq. 6): () squared error of the return that a random
    subset of distinct turns predicts, in points squared."""
    return (score - predicted_return(rewards, length)) ** 2


def li_loss(rewards: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-modal distillation: () mean squared error of r_t (n,) against the listener's affect f_t (n,) in [-1, 1],
    over the turns of which it is known, not NaN; NaN if there is none."""
    known = ~targets.isnan()
    return ((rewards[known] - targets[known]) ** 2).mean()


def geli_loss(ge: torch.Tensor, li: torch.Tensor, weight: float, ge_scale: float = 1.0, li_scale: float = 1.0):
    """lambda * L_GE / ge_scale + (1 - lambda) * L_LI / li_scale, with lambda = `weight`. Scales of 1 give the published
    loss."""
    return weight * ge / ge_scale + (1 - weight) * li / li_scale


def ircr_loss(rewards: torch.Tensor, score: float, length: float) -> torch.Tensor:
    """Every turn regresses to its even share R/L of the score (Gangwani et al., NeurIPS 2020): () in (points a turn)
    squared."""
    return ((rewards - score / length) ** 2).mean()


def llm_loss(rewards: torch.Tensor, score: float, length: float, shares: torch.Tensor) -> torch.Tensor:
    """Every turn regresses to the share of the score that a language model gave it (as in Lee et al., Findings of EMNLP
    2025), and the predicted return to R, to which the shares sum: () in (points a turn) squared.

    Args:
        shares: (k,) T times the turns' shares, in points: what R would be if all turns were worth as much.
    """
    return li_loss(rewards, shares / length) + rrd_loss(rewards, score, length) / length**2


def rudder_loss(predictions: torch.Tensor, score: float, length: float) -> torch.Tensor:
    """Squared error of the return predicted after the last turn, plus 0.5 * the mean squared error of all predictions
    (RUDDER, Arjona-Medina et al., NeurIPS 2019, auxiliary task of section A8): () in points squared.

    Args:
        predictions: (T + 1,) of the return, before the first turn and after every turn. length: not used.
    """
    errors = (score - predictions) ** 2
    return errors[-1] + 0.5 * errors.mean()


def rudder_rewards(predictions: torch.Tensor, length: float, n_turns: float) -> torch.Tensor:
    """Rewards r_t = (T (g_t - g_{t-1}) + g_0) / L from the predictions g_0, ..., g_T of the return.

    The differences of RUDDER sum to g_T - g_0. Times T/L, and with the expected return g_0 of an empty prefix shared
    out evenly, they are on the scale of the other decompositions: L times their mean is the predicted return g_T.

    Args:
        predictions: (..., t + 1) the first predictions of a trajectory, for (..., t) rewards. n_turns: T, or a tensor
            that broadcasts with the rewards.
    """
    return (n_turns * predictions.diff(dim=-1) + predictions[..., :1]) / length


def supervised_contrastive_loss(hidden: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """SupCon (Khosla et al., NeurIPS 2020, eq. 2): rows of the same label attract each other, all others repel.

    Args:
        hidden: (n, d), normalised to unit length here. labels: (n,) integers. temperature: of the softmax.

    Returns:
        (), the mean over the rows that share their label with another row; 0 if there are none.
    """
    z = nn.functional.normalize(hidden.float(), dim=1)
    diagonal = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = (z @ z.T / temperature).masked_fill(diagonal, -torch.inf).log_softmax(dim=1).masked_fill(diagonal, 0.0)
    same = (labels[:, None] == labels[None]) & ~diagonal
    n_same = same.sum(dim=1)
    per_row = -(log_p * same).sum(dim=1) / n_same.clamp(min=1)
    return per_row.sum() / (n_same > 0).sum().clamp(min=1)


CONTRASTIVE_TEMPERATURE, CONTRASTIVE_WEIGHT = 0.3, 0.3


def contrastive_term(hidden: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    """() The weighted contrastive loss of the head's hidden layer (n, d) by labels (n,), which `--contrastive` adds."""
    labels = torch.as_tensor(labels, device=hidden.device)
    return CONTRASTIVE_WEIGHT * supervised_contrastive_loss(hidden, labels, CONTRASTIVE_TEMPERATURE)


def surface_correlations(rewards: torch.Tensor, surface: torch.Tensor, least: float = 0.0) -> torch.Tensor:
    """(d,) Pearson's correlations of rewards (n,) with what is on the surface of their turns' texts (n, d); 0 with what
    is the same in all of them. The sum of their squares is the penalty that keeps a reward from following length and
    punctuation (ODIN, Chen et al., 2024, in its simplest form: of one head).

    Args:
        least: rewards whose standard deviation is smaller count as if it were this, since the gradient of a correlation
            has no bound where rewards are nearly the same.
    """
    rewards, surface = rewards - rewards.mean(), surface - surface.mean(dim=0)
    squares = rewards.square().mean().clamp(min=least**2) * surface.square().mean(dim=0)
    return rewards @ surface / len(rewards) / squares.clamp(min=1e-12).sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# Decompositions: ways to train turn rewards from one score


class Decomposition(NamedTuple):
    """A way to train turn rewards from one score.

    The rewards of all of them are on one scale: L times their mean over a trajectory's turns is its predicted return.

    Attributes:
        loss: (outputs (k,) of the head, score, length) -> () loss; with `uses_shares` also of the turns' shares (k,).
        help: one line for `--help`.
        target: (scores, lengths) -> what the loss regresses to; its variance scales `--loss_scale normalized`. With
            `uses_shares` it gets the shares of all turns in place of the scores.
        uses_subset: whether the loss takes K random turns of a trajectory (else all of them, in order).
        uses_shares: whether it needs a language model's shares of the scores (`--llm_shares`).
        head: the head that it needs, a key of `HEADS`; None: the head that the options choose.
    """

    loss: Callable[..., torch.Tensor]
    help: str
    target: Callable = lambda scores, lengths: scores
    uses_subset: bool = False
    uses_shares: bool = False
    head: str | None = None


DECOMPOSITIONS = {
    "RRD": Decomposition(rrd_loss, "random subsets of K turns estimate the return", uses_subset=True),
    "IRCR": Decomposition(ircr_loss, "every turn regresses to R/L", target=lambda scores, lengths: scores / lengths),
    "RUDDER": Decomposition(
        rudder_loss,
        "an LSTM predicts the return after every turn; rewards are its differences",
        head="rudder",
    ),
    "LLM": Decomposition(
        llm_loss,
        "every turn regresses to its share of R by a language model (--llm_shares)",
        target=lambda shares, lengths: shares / lengths,
        uses_subset=True,
        uses_shares=True,
    ),
}


def sample_turns(n_turns: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of min(k, n_turns) distinct random turns, ascending."""
    return np.arange(n_turns) if k >= n_turns else np.sort(rng.choice(n_turns, size=k, replace=False))


def length_of(ep_len: int | str, n_turns: int) -> float:
    """L of a trajectory with `n_turns` agent turns, by `--ep_len`."""
    return float(n_turns if ep_len == "actual" else ep_len)


def predicted_returns(
    turns: TurnSet, rewards: np.ndarray, ep_len: int | str, chosen: np.ndarray | None = None
) -> np.ndarray:
    """(n,) returns in points that the rewards (N,) of n trajectories' turns predict. `chosen`: (N,) bool, the turns to
    use; None: all."""
    rewards = np.asarray(rewards, dtype=np.float64)
    chosen = np.ones(len(turns), dtype=bool) if chosen is None else chosen
    parts = [turns.turns_of(i) for i in range(len(turns.trajectories))]
    return np.array([predicted_return(rewards[p][chosen[p]], length_of(ep_len, p.stop - p.start)) for p in parts])


def loss_scales(loss_scale: str, redist_type: str, ep_len: int | str, training: TurnSet) -> tuple[float, float]:
    """What the GE and the LI loss are divided by: 1 (`raw`), or the variances of their targets over the training set
    (`normalized`), so that both count alike."""
    if loss_scale == "raw":
        return 1.0, 1.0
    row, turns = DECOMPOSITIONS[redist_type], np.diff(training.offsets)
    lengths = np.array([length_of(ep_len, n) for n in turns])
    of_turns = (training.shares, np.repeat(lengths, turns)) if row.uses_shares else (training.scores, lengths)
    ge_targets = row.target(*of_turns)
    li_targets = training.targets[~np.isnan(training.targets)]
    return float(ge_targets.var()) or 1.0, float(li_targets.var() if len(li_targets) else 0) or 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Options of reward training


@dataclass(frozen=True)
class RewardTrainingOptions:
    """Training and validation of stages 1 and 2."""

    preset: str | None = option(
        None,
        "defaults of other options: small: learning rate, epochs and context (stage 2: batch size, epochs, context "
        "and, with LI, the loss scale) for encoders of a few million parameters (default: as published)",
        choices=("small",),
    )
    val: bool = option(False, "evaluate on the validation conversations")
    val_all: bool = option(
        False, "with --val: on every conversation behind the training ones, not only on the last 50 (or tenth)"
    )
    epochs: int = option(8, "passes over the training conversations", type=positive_int)
    patience: int | None = option(
        None,
        "with --val: end training after so many validations in a row without a better one (default: after --epochs); "
        "stage 1 then validates every epoch, or every 500 steps in longer ones",
        type=positive_int,
        metavar="N",
    )
    learning_rate: float = option(5e-6, "peak learning rate", type=positive_float)
    ep_len: int | str = option(160, "L of the return, in turns, or 'actual' for each one's own", type=episode_length)
    contrastive: bool = option(False, "every second epoch add a supervised contrastive loss by affect")
    curriculum: bool = option(
        False, "in training, show the encoder the user's answer after the response (--curriculum_exposure includes it)"
    )
    curriculum_exposure: bool = option(
        False, "show the answer with a probability that falls from 1 to 0 over the epochs"
    )
    bar_chart: bool = option(False, "log bar charts of predicted reward by turn to wandb (with --val)")


def refuse_unused(refuse: Callable[[str, str], None], training: RewardTrainingOptions, signal: SignalOptions) -> None:
    """Refuses options that would do nothing in stages 1 and 2.

    Args:
        refuse: (names of options, why) ends the program if one of them was given.
    """
    if not training.val:
        refuse("val_all bar_chart log_text patience", "nothing is validated: give --val")
    if training.epochs == 1:
        refuse("contrastive", "changes every second epoch, and there is one: give --epochs 2 or more")
    if signal.li_signal and not LI_SIGNALS[signal.li_signal].uses_model:
        refuse("sentiment_model", f"is not used by --li_signal {signal.li_signal}: give --li_signal sentiment")


# ---------------------------------------------------------------------------------------------------------------------
# Reward heads: features of a turn (n, hidden) -> reward (n, 1)


def _relu_stack(*widths: int, normalize: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between them; `normalize`: LayerNorm before each ReLU."""
    layers: list[nn.Module] = [nn.Linear(*widths[:2])]
    for before, after in pairwise(widths[1:]):
        layers += [nn.LayerNorm(before)] * normalize + [nn.ReLU(), nn.Linear(before, after)]
    return nn.Sequential(*layers)


def shrink_head(hidden: int) -> nn.Sequential:
    """h-128-1 with dropout 0.2 and ReLU between the layers, tanh at the end.

    Dropout behind the last layer, which the published heads have, would drop rewards, not features. Of a squared error
    of single turns the rewards that remain fit the target; of that of a return their mean, with the zeros, fits. So no
    one reward in evaluation would be what every loss has fitted (docs/method.md).
    """
    return nn.Sequential(nn.Linear(hidden, 128), nn.Dropout(0.2), nn.ReLU(), nn.Linear(128, 1), nn.Tanh())


def published_head(hidden: int) -> nn.Sequential:
    """The published heads' layers: `shrink_head` with dropout 0.2 before tanh; their weights have the same names."""
    *layers, tanh = shrink_head(hidden)
    return nn.Sequential(*layers, nn.Dropout(0.2), tanh)


class RudderCells(nn.Module):
    """RUDDER's LSTM: the cell input sees only the input, the input gate only the recurrence; no forget or output gate.

    c_t = c_{t-1} + sigmoid(U h_{t-1} + b) * tanh(W x_t + a), h_t = tanh(c_t), with c_0 = h_0 = 0.
    """

    def __init__(self, hidden: int, cells: int = 16):
        super().__init__()
        self.cell_input = nn.Linear(hidden, cells)
        self.input_gate = nn.Linear(cells, cells)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """h (..., T + 1, cells) before the first turn (0) and after each turn of a trajectory, or several, with
        features (..., T, hidden)."""
        inputs = torch.tanh(self.cell_input(features))
        cell = output = torch.zeros_like(inputs[..., 0, :])
        outputs = [output]
        for t in range(inputs.shape[-2]):
            cell = cell + torch.sigmoid(self.input_gate(output)) * inputs[..., t, :]
            output = torch.tanh(cell)
            outputs.append(output)
        return torch.stack(outputs, dim=-2)


class Head(NamedTuple):
    """A kind of reward head.

    Attributes:
        make: hidden size -> the head's layers. help: one line for `--help`.
        selectable: whether an option `--{name}` chooses it; else it is the default or belongs to a decomposition.
        rewards: of a *sequential* head, whose inputs are one trajectory's turns in order, and which has an output
            before the first turn and after every turn: (outputs (..., t + 1), length, n_turns) -> rewards (..., t).
            None: the outputs are the rewards, each of a turn by itself.
    """

    make: Callable[[int], nn.Sequential]
    help: str
    selectable: bool = True
    rewards: Callable[..., torch.Tensor] | None = None


_WIDTHS = (768, 128, 32, 1)  # of the default head's layers
HEADS = {
    "default": Head(lambda hidden: _relu_stack(hidden, *_WIDTHS), "h-768-128-32-1, ReLU", selectable=False),
    "small_model_shrink": Head(shrink_head, "h-128-1, dropout 0.2 and ReLU, tanh at the end"),
    "small_model": Head(lambda hidden: _relu_stack(hidden, 128, 32, 1), "h-128-32-1, ReLU"),
    "batch_norm": Head(
        lambda hidden: _relu_stack(hidden, *_WIDTHS, normalize=True),
        "the default head with LayerNorm after each hidden layer",
    ),
    "hard_shrink": Head(
        lambda hidden: nn.Sequential(*_relu_stack(hidden, *_WIDTHS), nn.GELU()),
        "the default head with a GELU at the end",
    ),
    "published": Head(published_head, "small_model_shrink with dropout 0.2 of the output", selectable=False),
    "rudder": Head(  # a prediction of the return before the first turn and after every turn
        lambda hidden: nn.Sequential(RudderCells(hidden), nn.Linear(16, 1)),
        "16 LSTM cells", selectable=False, rewards=rudder_rewards,
    ),
}  # fmt: skip


def _chosen_head(options) -> str:
    """The key of `HEADS` that the options choose."""
    return next((field.name for field in fields(options) if getattr(options, field.name)), "default")


_EXCLUSIVE = f"reward head (default: {HEADS['default'].help})"
HeadOptions = make_dataclass(
    "HeadOptions",
    [(name, bool, option(False, head.help, exclusive=_EXCLUSIVE)) for name, head in HEADS.items() if head.selectable],
    frozen=True,
    namespace={"__doc__": "A switch for each selectable head; at most one is set.", "chosen": property(_chosen_head)},
)


@dataclass(frozen=True)
class RewardHeadConfig:
    """What a saved head records.

    Attributes:
        head: a key of `HEADS`. hidden: the encoder's width.
        encoder: the encoder that it was trained on: a hub id, or a folder relative to the head's file; None where the
            file (a published one) records none. encoder_is_folder: which of the two.
        max_length, context_turns: how its input text was cut. ep_len: L of the return, in turns, or `actual`.
        stage: 1 or 2. reward_class: the score, None where not recorded. redist_type: the decomposition (stage 2).
        li: whether it was trained with LI. li_signal, sentiment_model: where LI's targets came from.
        members: heads in the file; more than one are an ensemble. decorrelate: weight of the penalty on correlations
            with the surface of texts (`surface_correlations`).
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
    ep_len: int | str = 160
    members: int = 1
    decorrelate: float = 0.0

    def check(self) -> None:
        """Raises a ValueError for values that no head of this program records."""
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            if type(value) not in (get_args(kind) or (kind,)):
                raise ValueError(f"{field.name}: expected {getattr(kind, '__name__', kind)}, found {value!r}"[:200])
        allowed = {
            "head": HEADS,
            "stage": (1, 2),
            "reward_class": (None, *QUESTIONS),
            "redist_type": (None, *DECOMPOSITIONS),
            "li_signal": LI_SIGNALS,
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: unknown: {getattr(self, name)!r}"[:200])
        for name in ("hidden", "max_length", "context_turns", "ep_len", "members"):
            value = getattr(self, name)
            if value != "actual" and (isinstance(value, str) or not 1 <= value < 1 << 31):
                raise ValueError(f"{name}: expected at least 1 and less than 2**31, found {value}"[:200])
        if self.encoder is not None and not (self.encoder.isprintable() and self.encoder):
            raise ValueError(f"encoder: expected a hub id or a folder, found {self.encoder!r}"[:200])
        if self.encoder_is_folder and (self.encoder is None or Path(self.encoder).is_absolute()):
            raise ValueError(f"encoder: expected a folder relative to the head's, found {self.encoder}"[:200])
        if self.members > 1 and (self.stage == 1 or HEADS[self.head].rewards):
            raise ValueError(f"members: expected 1 of stage 1 or a sequential head, found {self.members}")


def head_config(options, encoder, /, **values) -> RewardHeadConfig:
    """The configuration of a head that a stage with these `options` trains on the features of `encoder`; `values` are
    those that only the stage knows."""
    return RewardHeadConfig(
        hidden=encoder.hidden_size, max_length=encoder.max_length, context_turns=options.data.context_turns,
        reward_class=options.data.reward_class, li_signal=options.signal.li_signal,
        sentiment_model=options.signal.sentiment_model, ep_len=options.training.ep_len, **values,
    )  # fmt: skip


class RewardHead(nn.Module):
    """r_theta on top of the encoder: (n, hidden) -> (n, 1). `config` is a `RewardHeadConfig`."""

    def __init__(self, config: RewardHeadConfig):
        super().__init__()
        self.config = config
        self.layers = HEADS[config.head].make(config.hidden)
        self._last = max(i for i, layer in enumerate(self.layers) if isinstance(layer, nn.Linear))

    @property
    def members(self) -> "list[RewardHead]":
        """The single heads in it: itself."""
        return [self]

    @property
    def sequential(self) -> bool:
        """Whether a turn's reward depends on the turns before it (see `Head`)."""
        return HEADS[self.config.head].rewards is not None

    @property
    def bounded(self) -> bool:
        """Whether its rewards stay between -1 and 1."""
        return any(isinstance(layer, nn.Tanh) for layer in self.modules())

    @torch.no_grad()
    def init_constant(self, value: float) -> None:
        """Makes an untrained head predict `value` everywhere (or the closest that its last activation can give), by
        zero weights and a fitting bias in its last linear layer. A random initialisation differs more between turns
        than training at stage 1's learning rate changes, and much of it would go into shifting the mean."""
        last, ending = self.layers[self._last], self.layers[self._last + 1 :]
        nn.init.zeros_(last.weight)
        if not any(isinstance(layer, (nn.Tanh, nn.GELU)) for layer in ending):
            last.bias.fill_(value)
            return
        # bisection over the interval in which the activation increases
        low, high = (-0.75, 10.0) if isinstance(ending[-1], nn.GELU) else (-10.0, 10.0)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if ending[-1](torch.tensor(middle)) < value else (low, middle)
        last.bias.fill_(low)

    def forward(self, features: torch.Tensor, with_hidden: bool = False):
        """Rewards (n, 1) of turns with `features` (n, hidden); of a sequential head the predictions (n + 1, 1) that
        `rewards` makes rewards of. With `with_hidden` also the last hidden layer (n, d)."""
        hidden = self.layers[: self._last](features)
        outputs = self.layers[self._last :](hidden)
        if not with_hidden:
            return outputs
        return outputs, hidden[..., 1:, :] if self.sequential else hidden

    def rewards(self, outputs: torch.Tensor, n_turns) -> torch.Tensor:
        """Rewards (..., t) of a trajectory's first t turns from the head's outputs, of which a sequential head has one
        more. `n_turns`: T of the trajectory, or a tensor that broadcasts with the rewards."""
        of_outputs = HEADS[self.config.head].rewards
        length = n_turns if self.config.ep_len == "actual" else float(self.config.ep_len)
        return of_outputs(outputs, length, n_turns) if of_outputs else outputs


class RewardEnsemble(RewardHead):
    """Several heads of one kind on the same features (n, hidden), as one head. Its reward (n, 1) is the mean of theirs,
    less `spread_penalty` times their standard deviation, with K - 1 (Coste et al., ICLR 2024, arXiv 2310.02743)."""

    def __init__(self, config: RewardHeadConfig):
        nn.Module.__init__(self)  # without layers of its own
        self.config, self.spread_penalty = config, 0.0
        self.heads = nn.ModuleList(RewardHead(replace(config, members=1)) for _ in range(config.members))

    @property
    def members(self) -> list[RewardHead]:
        """The single heads in it."""
        return list(self.heads)

    def each(self, features: torch.Tensor) -> torch.Tensor:
        """(K, n, 1) The members' rewards."""
        return torch.stack([head(features) for head in self.heads])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(n, 1) The ensemble's reward."""
        rewards = self.each(features)
        return rewards.mean(dim=0) - self.spread_penalty * rewards.std(dim=0)

    def mean_of_weights(self) -> RewardHead:
        """One head with the mean of the members' weights (WARM, Ramé et al., ICML 2024, arXiv 2401.12187)."""
        head, states = RewardHead(replace(self.config, members=1)), [head.state_dict() for head in self.heads]
        head.load_state_dict({name: torch.stack([state[name] for state in states]).mean(dim=0) for name in states[0]})
        return head.train(self.training)


def new_reward_head(config: RewardHeadConfig) -> RewardHead:
    """An untrained head with this configuration, or an ensemble of them."""
    return RewardEnsemble(config) if config.members > 1 else RewardHead(config)


def head_rewards(head: RewardHead, features: torch.Tensor, turns: TurnSet | None = None) -> np.ndarray:
    """(N,) float32 rewards of encoded turns (N, hidden), in eval mode. A sequential head needs the `turns`, to see
    where trajectories begin."""
    was_training = head.training
    head.eval()
    features = features.to(next(head.parameters()).device)
    parts = [turns.turns_of(i) for i in range(len(turns.trajectories))] if head.sequential else [slice(None)]
    with torch.inference_mode():
        found = [head.rewards(head(features[part]).squeeze(1).float(), len(features[part])) for part in parts]
        rewards = torch.cat(found).cpu().numpy()
    head.train(was_training)
    return rewards


# ---------------------------------------------------------------------------------------------------------------------
# PPO: pure functions
#
# Shapes: n responses, R token positions. `mask` (n, R) is 1 on kept tokens and 0 on padding and behind the cut; values
# there must not matter.


def whiten(values: torch.Tensor, mask: torch.Tensor, mean: float, variance: float) -> torch.Tensor:
    """`values` (n, R) shifted and scaled to mean 0 and variance 1, where `mean` and `variance` are those over all kept
    tokens of all processes; 0 where not kept."""
    return (values - mean) * (variance + 1e-8) ** -0.5 * mask


def token_rewards(score: torch.Tensor, logprobs, ref_logprobs, mask, beta: float) -> torch.Tensor:
    """Reward of every token: -beta (log pi - log pi_ref), an unbiased estimate of the KL penalty because pi generated
    the tokens, plus the response's score on its last kept token.

    Args:
        score: (n,). logprobs, ref_logprobs, mask: (n, R). beta: weight of the KL.

    Returns:
        (n, R), 0 where not kept.
    """
    rewards = -beta * (logprobs - ref_logprobs) * mask
    last = mask.sum(dim=1).long() - 1
    rewards[torch.arange(len(score)), last] += score
    return rewards


def kl_ahead(kl: torch.Tensor, mask: torch.Tensor, total: Callable = lambda sums: sums) -> torch.Tensor:
    """What a token costs later: the KL of the states that follow it, minus the mean of that over the responses that
    have a token at its place (a baseline). The KL of its own distribution is not its doing: the update takes the
    gradient of that.

    Args:
        kl: (n, R) of each token's whole distribution. mask: (n, R). total: sums (2, R) over all processes.

    Returns:
        (n, R), 0 where not kept.
    """
    kl = kl * mask
    ahead = (kl.flip(1).cumsum(dim=1).flip(1) - kl) * mask
    sums, counts = total(torch.stack([ahead.sum(dim=0), mask.sum(dim=0)]))
    return (ahead - sums / counts.clamp(min=1)) * mask


def leave_one_out(scores: torch.Tensor, size: int) -> torch.Tensor:
    """Scores (n,) minus the mean of the others in their group of `size` responses to one prompt, which stand next to
    each other (the baseline of RLOO, Ahmadian et al., 2024). With groups of 1, the scores as they are."""
    if size == 1:
        return scores
    groups = scores.view(-1, size)
    return ((groups - groups.mean(dim=1, keepdim=True)) * (size / (size - 1))).flatten()


def gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float):
    """Generalized advantage estimation (Schulman et al., 2016, eq. 16): A_t = sum_l (gamma lam)^l delta_{t+l} with
    delta_t = r_t + gamma V_{t+1} - V_t, and V = 0 after the last kept token.

    Args:
        rewards, values, mask: (n, R), kept tokens first.

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
        logprobs, values: (n, R) of the policy that is updated. old_logprobs, old_values: of the rollout.
        advantages, returns, mask: (n, R).
        clip: of the ratio around 1. value_clip: of the value around the old one.
        tokens: what sums are divided by: the kept tokens of the whole optimizer step, so that accumulated gradients
            equal one large batch's. None: the kept tokens here.

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


def adapted_beta(beta: float, kl: float, n: int, target: float, horizon: float) -> float:
    """The weight beta of the KL penalty after a batch of `n` responses with mean KL `kl`, adapted so that the KL
    approaches `target` (Ziegler et al., 2019, section 2.2), both in nats a response.

    Args:
        horizon: responses over which the largest error (0.2) multiplies beta by e^0.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * n / horizon)


class RunningMoments:
    """Mean and standard deviation of all scores so far (the parallel update of Chan et al., 1979)."""

    def __init__(self):
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    @property
    def std(self) -> float:
        """Population standard deviation; 1 as long as all values were equal."""
        return (self._squares / self.count) ** 0.5 if self._squares > 0 else 1.0

    def normalize(self, values: torch.Tensor) -> torch.Tensor:
        """Adds `values` (n,), on the CPU, to the moments, and returns them normalized by the updated moments."""
        n, mean = len(values), values.double().mean().item()
        squares = ((values.double() - mean) ** 2).sum().item()
        total, shift = self.count + n, mean - self.mean
        self._squares += squares + shift**2 * self.count * n / total
        self.mean += shift * n / total
        self.count = total
        return (values - self.mean) / (self.std + 1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# The PPO step


def adafactor(parameters: Sequence[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Adafactor (Shazeer and Stern, 2018) with a constant learning rate, as published."""
    from transformers.optimization import Adafactor  # slow to import, and not needed to parse options

    return Adafactor(parameters, lr=learning_rate, scale_parameter=False, relative_step=False, warmup_init=False)


def adamw(parameters: Sequence[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019) without weight decay: what pulls the policy back is the KL penalty."""
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)


OPTIMIZERS = {"adafactor": adafactor, "adamw": adamw}


@dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO, by the names that they have in TRL's PPOConfig; the defaults are the published ones.

    TRL's trainers, which are other choices of `--algo`, take the preset, the learning rate, the batch size, and the
    length of responses from here.
    """

    title: ClassVar[str] = "PPO (the names are those of TRL's PPOConfig)"

    preset: str | None = option(
        None,
        "the defaults of this group and of the adapter: small: chosen on a policy of 2M parameters (default: as "
        "published, for 7B)",
        choices=("small",),
    )
    learning_rate: float = option(1.4e-5, "peak learning rate", type=positive_float)
    batch_size: int = option(24, "responses a step", type=positive_int)
    num_generations: int | None = option(
        None,
        "responses to each prompt of a step; with several, a response's score is compared with the mean of the others "
        "(default: 1; rloo and grpo: 4)",
        type=positive_int,
    )
    mini_batch_size: int = option(4, "most responses in a forward and backward pass", type=positive_int)
    gradient_accumulation_steps: int = option(2, "ppo, distill: minibatches in an optimizer step", type=positive_int)
    ppo_epochs: int = option(1, "ppo, distill: passes over a batch", type=positive_int)
    optimizer: str = option("adafactor", "ppo, distill: adafactor, as published, or adamw", choices=OPTIMIZERS)
    init_kl_coef: float = option(0.15, "ppo: initial weight of the KL penalty", type=non_negative_float)
    exact_kl: bool = option(
        False,
        "ppo: penalize the KL of each token's whole distribution, whose gradient has no sampling noise, in place of "
        "the log-ratio of the token that was drawn; advantages are then not whitened",
    )
    fixed_kl_coef: bool = option(False, "ppo: the weight of the KL penalty stays as it is")
    target: float = option(
        6.0, "ppo: the KL that this weight is adapted to, in nats a response", type=positive_float, metavar="NATS"
    )
    horizon: float = option(
        10_000.0, "ppo: responses over which it is adapted; more adapt it more slowly", type=positive_float
    )
    gamma: float = option(1.0, "ppo: discount of later tokens' rewards", type=fraction)
    lam: float = option(0.95, "ppo: lambda of GAE, generalized advantage estimation", type=fraction)
    cliprange: float = option(0.2, "ppo: how far the probability ratio may move from 1", type=positive_float)
    cliprange_value: float = option(0.2, "ppo: how far a value may move from the rollout's", type=positive_float)
    vf_coef: float = option(0.1, "ppo: weight of the value loss", type=non_negative_float)
    critic: str = option(
        "head",
        "ppo: what predicts a response's score from its tokens so far: head: the value head, as published; ridge: a "
        "ridge regression on earlier responses",
        choices=("head", "ridge"),
    )
    target_kl: float = option(
        1.0,
        "ppo: a batch's update ends early when the KL to the policy before it exceeds 1.5 times this, in nats a token",
        type=positive_float,
        metavar="NATS",
    )
    no_early_stopping: bool = option(False, "ppo: never end an update early")
    min_new_tokens: int = option(
        32, "a batch's limit of response tokens is drawn from this up to --max_new_tokens", type=positive_int
    )
    max_new_tokens: int = option(MAX_NEW_TOKENS, "most tokens of a response", type=positive_int)


PPO_PRESETS = {
    None: PPOConfig(),  # as published
    "small": PPOConfig(
        preset="small", learning_rate=5e-3, batch_size=128, num_generations=4, mini_batch_size=32,
        gradient_accumulation_steps=4, optimizer="adamw", init_kl_coef=0.4, exact_kl=True, fixed_kl_coef=True,
        lam=0.9, critic="ridge", min_new_tokens=32, max_new_tokens=32,
    ),
}  # fmt: skip


UPDATE_SUMS = ("approx_kl", "policy_clipped", "value_clipped", "ratio", "policy_loss", "value_loss")


class PPO:
    """Proximal policy optimization of a language model on rewards of whole responses, with a KL penalty to a reference.

    Args:
        policy: a `geli.nets.policy.Policy`, which is trained.
        score: (prompts, responses) -> (n,) rewards. config: settings.
        accelerator: `accelerate.Accelerator`. seed: of response lengths, minibatches and sampling.

    Attributes:
        optimizer: of the policy's adapter and value head. beta: the weight of the KL penalty.
        moments: running moments of the scores. critic: the `RidgeCritic`, if that is the critic.
        human_scores: of the human answers so far, by the names of their prompts.
        rng, sampling: generators of lengths and minibatches, and of tokens.

    Raises:
        UserError: if there are fewer prompts in a batch than processes, or not whole groups of responses.
    """

    def __init__(self, policy, score: Callable, config: PPOConfig, accelerator, seed: int):
        self.group = config.num_generations or 1
        prompts, rest = divmod(config.batch_size, self.group)
        if rest or prompts < accelerator.num_processes:
            raise UserError(
                f"--batch_size {config.batch_size}: expected a multiple of --num_generations {self.group}, with at "
                f"least one prompt for each of {accelerator.num_processes} processes"
            )
        self.policy, self.score, self.config, self.accelerator = policy, score, config, accelerator
        self.optimizer = OPTIMIZERS[config.optimizer](policy.trainable(), config.learning_rate)
        self.beta, self.moments = config.init_kl_coef, RunningMoments()
        self.critic = RidgeCritic() if config.critic == "ridge" else None
        self.human_scores: dict[str, float] = {}
        self.rng, self.sampling = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        self._seconds: dict[str, float] = {}

    def state_dict(self) -> dict:
        """The state beside that of policy, optimizer and generators."""
        critic = {"critic": vars(self.critic).copy()} if self.critic else {}
        moments = vars(self.moments).copy()
        return {"beta": self.beta, "moments": moments, "human_scores": self.human_scores.copy(), **critic}

    def load_state_dict(self, state: dict) -> None:
        """Restores a state."""
        self.beta, self.human_scores = state["beta"], state["human_scores"]
        vars(self.moments).update(state["moments"])
        if self.critic:
            vars(self.critic).update(state["critic"])

    def step(self, prompts: Sequence[Prompt], update: bool = True) -> tuple[dict[str, float], list[str]]:
        """One PPO step on a batch of prompts.

        Args:
            prompts: the same in every process. update: False generates and scores only.

        Returns:
            what is logged, and the n responses, `num_generations` to each prompt, next to each other.

        Raises:
            NotFinite: if a score, a loss or a gradient is not finite.
        """
        config, self._seconds = self.config, {}
        # 1. Draw the batch's length limit and the random numbers that choose its tokens, the same in every process.
        # 2. Generate responses to this process' part of the prompts, and cut each where the agent's turn ends.
        with self._timed("generate"):
            mine, batch, limit = self._respond(prompts)
        # 3. Log-probabilities under the policy and the reference, and values.
        with self._timed("forward"):
            old = logprobs_and_values(self.policy, batch, config.mini_batch_size)
        if not config.exact_kl:  # its estimate by the tokens that were drawn
            old["kl"] = (old["logprobs"] - old["ref_logprobs"]) * batch.mask
        # 4. Score the responses, and the human answers for comparison; normalize by the running moments.
        with self._timed("score"):
            scores, normalized = self._score(mine, batch.texts)
            human = self._score_human_answers(prompts)
        # 5. A reward for every token: the KL penalty, unless it is exact, and the score on the last one.
        normalized, beta = normalized.to(batch.mask.device), self.beta
        rewards = token_rewards(
            normalized, old["logprobs"], old["ref_logprobs"], batch.mask, 0.0 if config.exact_kl else beta
        )
        # 6. Advantages and returns.
        if self.critic:
            old["values"] = self.critic.values(old["states"], batch.mask)
            self.critic.update(old["states"], batch.mask, normalized, self._total)
        advantages, returns = gae(rewards, old["values"], batch.mask, config.gamma, config.lam)
        if config.exact_kl:
            advantages = advantages - beta * kl_ahead(old["kl"], batch.mask, self._total)
        # 7. Statistics over all processes; they include what whitening needs.
        total = self._sum(_rollout_sums(batch, old, advantages, returns, limit, self.policy.ends))
        if not np.isfinite(list(total.values())).all():
            raise NotFinite("the policy's output")
        texts = gather_parts(batch.texts, self.accelerator)
        logged = {**_rollout_statistics(total, scores, texts), "human_score_mean": human, "beta": beta}
        if update:
            # 8. Update the policy on whitened advantages; with the exact KL on plain ones, so that beta, which weighs
            #    its gradient too, keeps its meaning.
            if not config.exact_kl:
                mean, variance = total["advantage"] / total["tokens"], _variance(total, "advantage", total["tokens"])
                advantages = whiten(advantages, batch.mask, mean, variance)
            with self._timed("update"):
                logged |= self._update(batch, partial(self._losses, batch, old, advantages, returns), len(texts))
            # 9. Adapt the weight of the KL penalty.
            if not config.fixed_kl_coef:
                self.beta = adapted_beta(beta, logged["kl"], len(texts), config.target, config.horizon)
        return {**logged, **{f"seconds_{name}": value for name, value in self._seconds.items()}}, texts

    def _respond(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], Rollout, int]:
        """This process' prompts, a group of responses to each of them, and the batch's length limit."""
        limit = draw_length(self.rng, self.config.min_new_tokens, self.config.max_new_tokens)
        uniforms = draw_uniforms(len(prompts) * self.group, limit, self.sampling)
        uniforms = local_part(uniforms.view(len(prompts), self.group, limit), self.accelerator).flatten(0, 1)
        mine = [prompt for prompt in local_part(list(prompts), self.accelerator) for _ in range(self.group)]
        return mine, rollout(self.policy, mine, uniforms, self.group), limit

    def _score(self, prompts: Sequence[Prompt], texts: Sequence[str]):
        """All processes' scores (n,), and this process' normalized ones; in groups each compared with the others."""
        scores = torch.tensor(gather_parts(self.score(prompts, texts).tolist(), self.accelerator))
        if not scores.isfinite().all():
            raise NotFinite("the score of a response")
        compared = leave_one_out(self.moments.normalize(scores), self.group)
        return scores, local_part(compared.view(-1, self.group), self.accelerator).flatten()

    def _score_human_answers(self, prompts: Sequence[Prompt]) -> float:
        """The mean score of the human answers, of which each is scored once in a run."""
        answers = {prompt.name or prompt.text: prompt for prompt in prompts}
        new = local_part([key for key in answers if key not in self.human_scores], self.accelerator)
        scored = [answers[key] for key in new]
        scores = self.score(scored, [prompt.human for prompt in scored]).tolist() if new else []
        found = zip(gather_parts(new, self.accelerator), gather_parts(scores, self.accelerator), strict=True)
        self.human_scores.update(found)
        return float(np.mean([self.human_scores[prompt.name or prompt.text] for prompt in prompts]))

    def _update(self, batch: Rollout, losses: Callable, n: int) -> dict[str, float]:
        """PPO epochs over the batch. Stops early when the policy has moved too far, unless told not to.

        Args:
            batch: this process' part. losses: of some responses, see `_losses`. n: responses of all processes.
        """
        config, totals = self.config, Counter()
        for chosen in self._optimizer_batches(n):
            sums = self._optimizer_step(batch, losses, chosen, n)
            totals.update(sums)
            totals["optimizer_steps"] += 1
            too_far = sums["approx_kl"] / sums["tokens"] > 1.5 * config.target_kl
            totals["stopped_early"] = float(too_far and not config.no_early_stopping)
            if totals["stopped_early"]:
                break
        of_tokens = {"approx_kl": "approx_kl", "policy_clipped": "policy_clip_fraction", "ratio": "ratio_mean"}
        of_steps = ["policy_loss", "gradient_norm"]
        if not self.critic:  # else the value head is not trained
            of_tokens["value_clipped"] = "value_clip_fraction"
            of_steps.append("value_loss")
        return {
            **{name: totals[key] / totals["tokens"] for key, name in of_tokens.items()},
            **{name: totals[name] / totals["optimizer_steps"] for name in of_steps},
            "optimizer_steps": float(totals["optimizer_steps"]),
            "stopped_early": totals["stopped_early"],
        }

    def _optimizer_batches(self, n: int) -> Iterator[np.ndarray]:
        """Random parts of the n responses, one for each optimizer step, the same in every process."""
        size = self.config.mini_batch_size * self.config.gradient_accumulation_steps
        for _ in range(self.config.ppo_epochs):
            order = self.rng.permutation(n)
            yield from (order[first : first + size] for first in range(0, n, size))

    def _optimizer_step(self, batch: Rollout, losses: Callable, chosen: np.ndarray, n: int) -> dict[str, float]:
        """One optimizer step on the responses `chosen` (indices into all processes' n), a minibatch at a time. Returns
        sums over their kept tokens, the losses and the gradient norm."""
        parts = local_part(torch.arange(n).view(-1, self.group), self.accelerator)
        held = parts.flatten().tolist()  # which of the n responses this process has
        mine = np.array([i - held[0] for i in chosen if held and held[0] <= i <= held[-1]], dtype=int)
        tokens = self._sum({"tokens": batch.mask[mine].sum()})["tokens"]
        sums = {name: torch.zeros((), device=batch.mask.device) for name in UPDATE_SUMS}
        for minibatch in minibatches(self.policy, batch.lengths[mine], self.config.mini_batch_size):
            loss, found = losses(mine[minibatch], tokens)
            self.accelerator.backward(loss)
            for name, value in found.items():
                sums[name] = sums[name] + value.detach()
        sums = {**self._sum(sums), "tokens": tokens}
        if not np.isfinite(list(sums.values())).all():
            self.optimizer.zero_grad()
            raise NotFinite("the loss or its gradient")
        return {**sums, "gradient_norm": apply_gradients(self.optimizer, self.accelerator)}

    def _losses(self, batch: Rollout, old: dict, advantages, returns, part: np.ndarray, tokens: float):
        """The loss of the responses `part`, and their `UPDATE_SUMS`. Losses are divided by `tokens`."""
        config, inputs = self.config, batch.rows(part)
        states = self.policy.states(*inputs, old["trunk"][part] if "trunk" in old else None)
        reference = old["ref_states"][part] if config.exact_kl else None
        logprobs, values, _, *compared = self.policy.logprobs_from_hidden(states, *inputs[2:], reference)
        policy_loss, value_loss, found = ppo_loss(
            logprobs, values, old["logprobs"][part], old["values"][part], advantages[part], returns[part],
            batch.mask[part], config.cliprange, config.cliprange_value, tokens,
        )  # fmt: skip
        if config.exact_kl:
            policy_loss = policy_loss + self.beta * compared[-1].sum() / tokens
        loss = policy_loss if self.critic else policy_loss + config.vf_coef * value_loss
        return loss, {**found, "policy_loss": policy_loss, "value_loss": value_loss}

    def _sum(self, values: dict[str, torch.Tensor]) -> dict[str, float]:
        """Sums over all processes, in one message and in Python's float64, because an accelerator may have none."""
        mine = torch.stack([value.detach().float().to(self.accelerator.device) for value in values.values()]).tolist()
        parts = gather_parts([mine], self.accelerator)
        return dict(zip(values, np.sum(parts, axis=0).tolist(), strict=True))

    def _total(self, sums: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, whose last dimensions may have different lengths."""
        padded = self.accelerator.pad_across_processes(sums, dim=sums.ndim - 1)
        return self.accelerator.reduce(padded, reduction="sum")[..., : sums.shape[-1]]

    @contextmanager
    def _timed(self, phase: str):
        start = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # kernels may still be running
        self._seconds[phase] = time.perf_counter() - start


def _rollout_sums(batch: Rollout, old: dict, advantages, returns, limit: int, ends: Sequence[int]) -> dict:
    """Sums over one process' responses and their kept tokens, from which the whole batch's statistics are computed."""
    mask, lengths = batch.mask, batch.mask.sum(dim=1)
    error = (returns - old["values"]) * mask
    return {
        "responses": torch.tensor(float(len(lengths))),
        "tokens": mask.sum(),
        "kl": old["kl"].sum(),
        "entropy": (old["entropies"] * mask).sum(),
        "value": (old["values"] * mask).sum(),
        "return": (returns * mask).sum(),
        "return_squared": (returns**2 * mask).sum(),
        "error": error.sum(),
        "error_squared": (error**2).sum(),
        "advantage": (advantages * mask).sum(),
        "advantage_squared": (advantages**2 * mask).sum(),
        "ended": ended_themselves(batch, ends).sum(),
        "at_length": (lengths == limit).sum(),
    }


def _rollout_statistics(total: dict[str, float], scores: torch.Tensor, texts: Sequence[str]) -> dict[str, float]:
    """What is logged of a batch's responses. KL is in nats a response, entropy in nats a token."""
    n, tokens = total["responses"], total["tokens"]
    return_variance = _variance(total, "return", tokens)
    return {
        "score_mean": scores.mean().item(),
        "score_std": scores.std(unbiased=False).item(),
        "kl": total["kl"] / n,
        "entropy": total["entropy"] / tokens,
        "value_mean": total["value"] / tokens,
        "explained_variance": 1 - _variance(total, "error", tokens) / return_variance if return_variance > 0 else 0.0,
        "response_length_mean": tokens / n,
        "ended_share": total["ended"] / n,
        "cut_at_length_share": total["at_length"] / n,
        "empty_share": float(np.mean([not text for text in texts])),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
    }


def _variance(total: dict[str, float], name: str, n: float) -> float:
    """Variance of n numbers from the sums of them and of their squares."""
    return max(total[f"{name}_squared"] / n - (total[name] / n) ** 2, 0.0)
