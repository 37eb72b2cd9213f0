"""Stage 2 (GELI): learns turn rewards that add up to the score (GE) and follow the listener's face (LI).

    python train_reward_GELI.py --redist_type RRD --reward_class overall_affect --model convo --batch_size 1 --K 160 \\
        --train_size 100 --train --val --small_model_shrink --affect_path devout-brook-114

With `--affect_path RUN` the head and the encoder start from that stage-1 run, and the loss is
lambda * GE + (1 - lambda) * LI; without it the loss is GE alone. The encoder is frozen, so every turn is encoded once,
unless `--unfreeze` trains it too.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data_utils import (
    LI_SIGNALS,
    Corpus,
    DataOptions,
    SignalOptions,
    TurnSet,
    fingerprint,
    load_turns,
    rating_probability,
)
from geli.nets.options import EncoderOptions
from geli.run.errors import UserError, run
from geli.run.options import (
    RunOptions,
    flat,
    fraction,
    non_negative_float,
    option,
    positive_float,
    positive_int,
    read_options,
    refuse,
)
from models import DECOMPOSITIONS, HEADS, HeadOptions, RewardHead, RewardTrainingOptions, head_config, refuse_unused

_DECOMPOSITIONS = "; ".join(f"{name}: {row.help}" for name, row in DECOMPOSITIONS.items())
_SUBSET_DECOMPOSITIONS = [name for name, row in DECOMPOSITIONS.items() if row.uses_subset]


@dataclass(frozen=True)
class GELITrainingOptions(RewardTrainingOptions):
    """Options of training that only this stage has."""

    train: bool = option(False, "train a head; without it --val evaluates the one of --reward_path")
    redist_type: str = option("RRD", f"how the score is decomposed. {_DECOMPOSITIONS}", choices=DECOMPOSITIONS)
    affect_path: str | None = option(
        None, "stage-1 run (name, or path of reward1_RUN) to start from; adds the LI loss", metavar="RUN"
    )
    ge_weight: float = option(0.5, "weight of GE; 1 - L is LI's", type=fraction, flag="--lambda", metavar="L")
    loss_scale: str = option(
        "raw",
        "normalized divides each loss by the variance of its own target over the training set",
        choices=("raw", "normalized"),
    )
    llm_shares: str | None = option(
        None, "with --redist_type LLM: the shares.csv that apps/llm_shares wrote", metavar="FILE"
    )
    reward_path: str | None = option(
        None, "with --val alone: the saved head to evaluate (run name or path)", metavar="HEAD"
    )
    batch_size: int = option(1, "conversations a step", type=positive_int)
    heads: int = option(
        1,
        "heads that are trained together and saved in one file, an ensemble: each draws its own order of conversations "
        "and subsets of turns, and without --affect_path starts from its own weights",
        type=positive_int,
    )
    decorrelate: float = option(
        0.0,
        "weight of a penalty on the squared correlations, over the turns of a step, of the reward with the response's "
        "words, exclamation marks and question marks; with 1, full correlation costs as much as a GE loss of the "
        "score's variance",
        type=non_negative_float,
        metavar="W",
    )
    K: int = option(
        160,
        f"turns drawn of a trajectory in a step (all when there are fewer), for {', '.join(_SUBSET_DECOMPOSITIONS)}; "
        "the others use all turns, and it only names the folder, as published",
        type=positive_int,
    )
    unfreeze: bool = option(False, "train the encoder too, and save it as lang_model_RUN")
    encoder_learning_rate: float = option(5e-6, "the encoder's, with --unfreeze", type=positive_float)


@dataclass(frozen=True)
class Options:
    """All options of this command."""

    data: DataOptions = DataOptions()
    signal: SignalOptions = SignalOptions()
    encoder: EncoderOptions = EncoderOptions()
    head: HeadOptions = HeadOptions()
    training: GELITrainingOptions = GELITrainingOptions(learning_rate=5e-3, epochs=4)
    run: RunOptions = RunOptions(save_steps=100)


PRESETS = {  # choices of --preset; the loss is normalized, because GE's part in points² drowns LI's
    None: Options(),
    "small": Options(
        data=DataOptions(context_turns=3),
        training=GELITrainingOptions(learning_rate=5e-3, epochs=16, batch_size=4, loss_scale="normalized"),
    ),
}
_HEAD_SWITCHES = " ".join(name for name, head in HEADS.items() if head.selectable)
# options that only training reads
_OF_TRAINING = (
    "affect_path batch_size contrastive curriculum curriculum_exposure decorrelate encoder_learning_rate epochs "
    f"ge_weight heads K learning_rate llm_shares loss_scale patience preset redist_type resume save_steps unfreeze "
    f"{_HEAD_SWITCHES}"
)


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """The options on the command line."""
    description = "Stage 2: learn turn rewards from the score (GE), with stage 1's affect (GELI) or without."
    options, parser, given = read_options(description, PRESETS, argv)
    training, decomposition = options.training, DECOMPOSITIONS[options.training.redist_type]
    if not training.train and not training.val:
        parser.error("nothing to do: give --train, --val or both")
    unused = partial(refuse, parser, given)
    if not training.train:
        unused(_OF_TRAINING, "nothing is trained: give --train")
        unused("model context_turns max_length", "the head of --reward_path brings its own")
    refuse_unused(unused, training, options.signal)
    if training.train:
        unused("reward_path", "is a head to evaluate, without --train; training starts from --affect_path")
    if training.train and not training.affect_path:
        of_li = (
            "contrastive ge_weight loss_scale li_signal sentiment_model reaction_type negative_affect unknown_reaction"
        )
        unused(of_li, "only LI uses it: give --affect_path")
    if not training.unfreeze:
        unused("encoder_learning_rate freeze_layers", "the encoder is not trained: give --unfreeze")
    else:
        unused("heads", "an ensemble shares a frozen encoder: leave out --unfreeze")
    if decomposition.head:
        unused(_HEAD_SWITCHES, f"{training.redist_type} has a network of its own")
        unused("heads", f"an ensemble cannot be of {training.redist_type}'s heads")
    if not decomposition.uses_shares:
        unused("llm_shares", "is for --redist_type LLM")
    elif not training.llm_shares:
        parser.error(f"--redist_type {training.redist_type} learns from a language model's shares: give --llm_shares")
    if not training.affect_path:  # there is nothing to weigh against, whatever the preset says
        training = replace(training, loss_scale="raw")
    return replace(options, training=training)


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else Options()

import numpy as np
import pandas as pd
import torch

from geli import heads
from geli.data.shares import read_shares
from geli.nets.encoder import TurnEncoder, open_encoder, place_encoder
from geli.nets.features import TurnFeatures, encoder_fingerprint
from geli.nets.pretrained import check_exists, named_by_file
from geli.report.checks import (
    check_li_targets,
    conversations_seen,
    warn_of_leaks,
    warn_of_other_corpus,
    warn_of_scores_out_of_reach,
)
from geli.report.lineage import lineage_config
from geli.report.rewards import (
    RewardRun,
    affect_means,
    correlations_with_surface,
    finish_run,
    measure,
    wandb_validation,
)
from geli.run.checkpoint import Checkpointer
from geli.run.distributed import frozen_dtype, gather_parts, local_part, make_accelerator, seed_everything
from geli.run.gradients import apply_gradients, decaying_adamw
from geli.run.lock import reward_run_to_resume
from geli.run.tracking import Tracker
from geli.run.training import Clock, Stage, train_steps
from models import (
    contrastive_term,
    geli_loss,
    head_rewards,
    length_of,
    li_loss,
    loss_scales,
    new_reward_head,
    predicted_return,
    sample_turns,
    surface_correlations,
)


def main(options: Options) -> None:
    """Reads the data, trains a head (or takes a saved one), evaluates it, and writes what was measured.

    | options | head and encoder start from | what is done |
    |---|---|---|
    | `--train --affect_path RUN` | that stage-1 run | GELI: the score and the LI signal |
    | `--train` | a fresh head on `--model` | GE: the score alone |
    | `--val --reward_path RUN` | that run | evaluation |
    """
    clock = Clock()
    seed_everything(options.run.seed)
    accelerator = make_accelerator(options.run.device, options.run.dtype)
    saved, saved_path = load_saved(options)
    options = follow_saved(options, saved, saved_path)
    arguments, folder = flat(options), output_folder(options, saved_path)
    if not saved:
        check_exists(*options.encoder.source())
    lock = reward_run_to_resume(arguments, folder)
    corpus, training, validation = load_data(options, saved, saved_path)
    clock.lap("reading conversations")
    encoder = find_encoder(options, accelerator, saved, saved_path)
    described = {**arguments, "data": corpus.numbers(), "lineage": lineage_config(saved_path)}
    tracker = Tracker(folder.name, folder, described, options.run, accelerator, lock)
    features = TurnFeatures(encoder, accelerator, options.run.cache_dir, frozen=not options.training.unfreeze)
    clock.lap("loading the encoder")
    head, metrics, paths = saved, {}, []
    if options.training.train:
        head = new_head(options, folder, tracker.name, saved, encoder, training)
        warn_of_scores_out_of_reach(head, training, options.training.ep_len)
        kinds = ("reward1", "lang_model") if options.training.unfreeze else ("reward1",)
        paths = [folder / f"{kind}_{tracker.name}" for kind in kinds]
        metrics = train(options, head, features, training, validation, tracker, paths)
        accelerator.wait_for_everyone()
        head = heads.load_reward_head(paths[0])  # the best one, from its file
        if options.training.unfreeze:
            trust = options.run.trust_remote_code
            features.encoder = open_encoder(options.encoder, accelerator, trust, name=str(paths[1]))
        clock.lap("encoding and training")
    rewards = returns = None
    if options.training.val:
        found = measure(head, features.held_out(validation.texts), validation, options.training.ep_len)
        metrics["validation"], rewards, returns = found
        metrics["validation"] |= correlations_with_surface(validation, rewards)
        mean_score_errors = (validation.scores - training.scores.mean()) ** 2
        metrics["validation"]["ge_loss_of_training_mean"] = float(mean_score_errors.mean())
        clock.lap("validation")
    report = RewardRun(
        title=title_of(head), stage=2, method=method_of(head), encoder=encoder.name, arguments=arguments,
        defaults=flat(Options()), corpus=corpus, training=training, validation=validation, metrics=metrics,
        rewards=rewards, returns=returns, paths=paths, started_from=saved_path, seconds=clock.seconds,
    )  # fmt: skip
    finish_run(report, tracker, folder)


# ---------------------------------------------------------------------------------------------------------------------
# What a run starts from


def load_saved(options: Options) -> tuple[RewardHead | None, Path | None]:
    """The saved head that the options name, to start from or to evaluate, and its path; (None, None) without one."""
    training, output_dir = options.training, options.run.output_dir
    if training.affect_path:
        path = heads.find_head(training.affect_path, output_dir, heads.STAGE_1_FOLDERS)
    elif training.reward_path:
        path = heads.find_head(training.reward_path, output_dir)
    elif training.train:
        return None, None
    else:
        raise UserError("--val without --train evaluates a saved head: name it with --reward_path RUN")
    saved = heads.load_reward_head(path)
    warn_of_other_corpus(path, options.data.data_dir)
    heads.encoder_of_head(saved.config, path, options.encoder.lang_model_path)  # mistakes in it are answered at once
    if training.affect_path and saved.config.stage != 1:
        raise UserError(f"--affect_path {training.affect_path}: expected a stage-1 head, {path} is of stage 2")
    learned = saved.config.reward_class
    if training.reward_path and learned not in (None, options.data.reward_class):
        raise UserError(
            f"{path}: was trained for {learned}, not {options.data.reward_class}: give --reward_class {learned}"
        )
    return saved, path


def follow_saved(options: Options, saved: RewardHead | None, path: Path | None) -> Options:
    """The options with what they leave to the saved head: its LI signal and, where it is only evaluated, how its input
    is cut."""
    signal = options.signal
    if signal.li_signal is None:
        model = signal.sentiment_model
        if saved and saved.config.sentiment_model and not model:
            model = named_by_file(saved.config.sentiment_model, path)
        signal = replace(signal, li_signal=saved.config.li_signal if saved else "face", sentiment_model=model)
    if signal.sentiment_model and not LI_SIGNALS[signal.li_signal].uses_model:
        learned = signal.li_signal
        raise UserError(f"--sentiment_model is for --li_signal sentiment, and this run learns from the {learned}")
    options = replace(options, signal=signal)
    if saved and not options.training.train:
        return replace(
            options,
            data=replace(options.data, context_turns=saved.config.context_turns),
            encoder=replace(options.encoder, max_length=saved.config.max_length),
        )
    return options


def output_folder(options: Options, saved_path: Path | None) -> Path:
    """The folder that the run writes to, whose name is wandb's project; that of the head, where it is evaluated."""
    training = options.training
    if saved_path and not training.train:
        return Path(options.run.output_dir) / saved_path.resolve().parent.name
    kind = "visual_feedback_baselines" if training.affect_path else "baselines"
    model, reward_class = Path(options.encoder.model).name, options.data.reward_class
    name = f"{kind}_{model}_{reward_class}_baseline_{training.redist_type}_K_{training.K}"
    return Path(options.run.output_dir) / name


def load_data(options: Options, saved: RewardHead | None, path: Path | None) -> tuple[Corpus, TurnSet, TurnSet]:
    """The corpus, with its training and validation turns, as `load_turns` reads them; prints warnings about them."""
    training_options = options.training
    seen = conversations_seen(path, saved.config) if saved else frozenset()
    corpus, training, validation = load_turns(
        options.data, options.signal, cache=options.run.cache_dir, learns_li=bool(training_options.affect_path),
        val_except=seen if training_options.val_all else None, validate=training_options.val,
        trust_remote_code=options.run.trust_remote_code,
        shares=read_shares(training_options.llm_shares) if training_options.llm_shares else None,
    )  # fmt: skip
    warn_of_leaks(seen, validation.trajectories)
    if training_options.affect_path:
        check_li_targets(training, options.signal)
    return corpus, training, validation


def find_encoder(options: Options, accelerator, saved: RewardHead | None, path: Path | None) -> TurnEncoder:
    """The encoder that the saved head was trained on, else the one that the options name, on its device."""
    named, trains, trust = options.encoder, options.training.unfreeze, options.run.trust_remote_code
    if not saved:
        return open_encoder(named, accelerator, trust, trains=trains)
    encoder = heads.load_encoder_of_head(
        saved.config, path, named.max_length, named.lang_model_path, frozen_dtype(accelerator), trust
    )
    return place_encoder(encoder, accelerator, named, trains)


def new_head(
    options: Options, folder: Path, run_name: str, saved: RewardHead | None, encoder: TurnEncoder, training: TurnSet
) -> RewardHead:
    """The head to train: stage 1's, or a fresh one if there is none or the decomposition needs its own kind; with
    `--heads` an ensemble of such heads."""
    required, affect_path = DECOMPOSITIONS[options.training.redist_type].head, options.training.affect_path
    reference = {"encoder": f"lang_model_{run_name}", "encoder_is_folder": True}
    if not options.training.unfreeze:
        reference = heads.encoder_reference(encoder.name, folder)
    learned = dict(
        stage=2, redist_type=options.training.redist_type, li=saved is not None, members=options.training.heads,
        decorrelate=options.training.decorrelate,
    )  # fmt: skip
    config = head_config(options, encoder, head=required or options.head.chosen, **learned, **reference)
    head = new_reward_head(config)
    if required:
        head.init_constant(float(training.scores.mean()))
    elif saved:
        kind = "small_model_shrink" if saved.config.head == "published" else saved.config.head  # of the same weights
        if kind != head.config.head:
            raise UserError(
                f"--affect_path {affect_path}: its head is of the kind {kind}, the options ask for {head.config.head}; "
                "give the options that it was trained with"
            )
        for member in head.members:
            member.load_state_dict(saved.state_dict())
    return head


def title_of(head: RewardHead) -> str:
    """The title of a run's report: the stage that trained the head, and how."""
    decomposition = f", {head.config.redist_type}" if head.config.stage == 2 else ""
    return f"Stage {head.config.stage} ({method_of(head)}{decomposition})"


def method_of(head: RewardHead) -> str:
    """What a head was trained on: LI, GE or GELI."""
    return "LI" if head.config.stage == 1 else "GELI" if head.config.li else "GE"


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(
    options: Options, head: RewardHead, features: TurnFeatures, training: TurnSet, validation: TurnSet,
    tracker: Tracker, paths: list[Path],
) -> dict:  # fmt: skip
    """Trains the head (with `--unfreeze` also the encoder), saves the best by GE loss to `paths` (of the head, of a
    trained encoder), and returns {"steps", "best_epoch", "best_ge_loss"}, with `--decorrelate` also the correlations
    before training."""
    encoder, before = features.encoder, {}

    def save() -> None:
        if not features.frozen:
            encoder.save(paths[1])
        heads.save_reward_head(head, paths[0])

    held_out = validation if options.training.val else None
    stage = GELITraining(
        head, features, training, held_out, options.training, features.accelerator, options.run.seed, save
    )
    if held_out and options.training.decorrelate:
        rewards = head_rewards(head, features.held_out(held_out.texts), held_out)
        before["before_training"] = correlations_with_surface(held_out, rewards)
    inputs = {"data": fingerprint(training.trajectories + validation.trajectories)}
    if training.shares is not None:
        inputs["shares"] = hashlib.sha256(training.shares.tobytes()).hexdigest()
    modules = {"head": head}
    if features.frozen or encoder.has_frozen_layers:
        inputs["encoder"] = encoder_fingerprint(encoder, "")
    if not features.frozen:  # what trains is in the checkpoint
        modules["encoder"] = encoder.encoder
    checkpointer = Checkpointer(
        tracker.lock, features.accelerator, modules=modules, optimizer=stage.optimizer,
        values={"schedule": stage.schedule, "best": stage.best, "order": stage.order, "logged": tracker.logged},
        generators={f"training {i}": rng for i, rng in enumerate(stage.rngs)}, inputs=inputs,
        every=options.run.save_steps, total=stage.steps,
    )  # fmt: skip
    train_steps(stage, stage.steps, "stage 2", checkpointer, tracker)
    return stage.best | before


class Drawn(NamedTuple):
    """What a step uses of trajectory `i`: the turns (k,), as indices; which of them show the user's rating (k,) bool;
    and its length L in turns."""

    i: int
    turns: np.ndarray
    rated: np.ndarray
    length: float


class TrajectoryLoss(NamedTuple):
    """The loss () of a trajectory, the head's hidden layer (k, d) that the contrastive loss takes, and what is logged:
    the squared error of the return, the LI loss; and the rewards (k,)."""

    loss: torch.Tensor
    hidden: torch.Tensor
    ge: float
    li: float
    rewards: torch.Tensor


class GELITraining(Stage):
    """Trains a head on the GELI loss (or GE alone), with a learning rate that decays linearly to 0.

    Args:
        head: trained in place; its configuration says whether it learns LI. Each member of an ensemble learns as a head
            alone would, from trajectories and turns that it draws itself; validation is of the ensemble's mean.
        features: of turns; trains the encoder too unless it is frozen. validation: turns to choose the best epoch by;
            None: the last epoch is saved.
        seed: of the orders of conversations and of subsets. save: called when the head is the best so far.

    Attributes:
        steps: optimizer steps, if `--patience` does not end training.
        best: {"best_epoch", "best_ge_loss", "steps"}, the last being the steps that were done or are to be done.
    """

    def __init__(
        self, head: RewardHead, features: TurnFeatures, training: TurnSet, validation: TurnSet | None,
        options: GELITrainingOptions, accelerator, seed: int, save: Callable[[], None],
    ):  # fmt: skip
        self.head, self.features, self.training, self.validation = head, features, training, validation
        self.options, self.accelerator, self.save = options, accelerator, save
        self.rngs = [np.random.default_rng([seed, i]) for i in range(len(head.members))]  # [seed, 0] is seed itself
        conversations: dict[str, list[int]] = {}
        for i, trajectory in enumerate(training.trajectories):
            conversations.setdefault(trajectory.conversation.id, []).append(i)
        self.conversations = list(conversations.values())  # the trajectories of each
        self.epoch_steps = -(-len(self.conversations) // options.batch_size)
        self.steps = options.epochs * self.epoch_steps
        self.order: dict[str, list[list[int]]] = {}  # of the conversations in this epoch, for each member
        self.scales = loss_scales(options.loss_scale, options.redist_type, options.ep_len, training)
        variance, _ = loss_scales("normalized", options.redist_type, options.ep_len, training)
        self.penalty = options.decorrelate * variance / self.scales[0]  # on the scale of GE's part of the loss
        self.least = loss_scales("normalized", "IRCR", options.ep_len, training)[0] ** 0.5  # deviation of R/L
        self.surface = torch.from_numpy(training.surface) if self.penalty else None
        shows_rating = options.curriculum or options.curriculum_exposure
        features.prepare(training.texts, training.rated_texts() if shows_rating else None)
        groups = [{"params": list(head.parameters()), "lr": options.learning_rate}]
        if options.unfreeze:
            groups.append({"params": features.encoder.trainable(), "lr": options.encoder_learning_rate})
        self.optimizer, self.schedule = decaying_adamw(groups, self.steps)
        self.best = {"steps": self.steps, "best_epoch": 0, "best_ge_loss": None}
        head.train()
        features.encoder.train(options.unfreeze)

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step on the trajectories of a few conversations, of which each process computes a part."""
        epoch, place = 1 + (step - 1) // self.epoch_steps, (step - 1) % self.epoch_steps
        if place == 0:
            self.order["groups"] = [rng.permutation(len(self.conversations)).tolist() for rng in self.rngs]
        size, self.batch, losses, logs = self.options.batch_size, [], [], []
        for head, rng, order in zip(self.head.members, self.rngs, self.order["groups"], strict=True):
            conversations = order[place * size : (place + 1) * size]
            batch = [i for conversation in conversations for i in self.conversations[conversation]]
            self.batch += batch
            loss, logged = self.batch_loss(head, self.sample(batch, rng, epoch), epoch)
            losses.append(loss)
            logs.append(logged)
        loss = torch.stack(losses).sum()
        if loss.requires_grad:
            loss.backward()
        norm = apply_gradients(self.optimizer, self.accelerator, self.schedule)
        return pd.DataFrame(logs).mean().to_dict() | {"train/gradient_norm": norm}

    def batch_loss(self, head: RewardHead, drawn: list[Drawn], epoch: int) -> tuple[torch.Tensor, dict[str, float]]:
        """This process' part of the loss () of a head on a batch, and what is logged of it."""
        mine, options = local_part(drawn, self.accelerator), self.options
        found = [self.trajectory_loss(head, one, len(mine)) for one in mine]
        terms = {"contrastive": self.contrastive_loss} if options.contrastive and epoch % 2 == 0 else {}
        if self.penalty:
            terms["decorrelation"] = self.decorrelation_loss
        # weighted so that the sum over processes is the batch's mean
        more = {
            name: term(mine, found) * len(mine) / len(drawn) if mine else torch.zeros(())
            for name, term in terms.items()
        }
        loss = torch.stack([torch.zeros(()), *(one.loss for one in found)]).sum() / len(drawn) + sum(more.values())
        loss = loss + self.features.idle_passes(-(-len(drawn) // self.accelerator.num_processes) - len(mine))
        logged = self.logged(drawn, found)
        for name, term in more.items():
            logged[f"train/{name}_loss"] = sum(gather_parts([term.item()], self.accelerator))
        return loss, logged

    def sample(self, batch: list[int], rng: np.random.Generator, epoch: int) -> list[Drawn]:
        """What is used of each trajectory in the batch. Every process draws all of it, so that their generators stay
        the same."""
        options, drawn = self.options, []
        probability = rating_probability(options.curriculum, options.curriculum_exposure, epoch, options.epochs)
        for i in batch:
            place = self.training.turns_of(i)
            n_turns = place.stop - place.start
            uses_subset = DECOMPOSITIONS[options.redist_type].uses_subset
            turns = sample_turns(n_turns, options.K, rng) if uses_subset else np.arange(n_turns)
            rated = rng.random(len(turns)) < probability if probability else np.zeros(len(turns), dtype=bool)
            drawn.append(Drawn(i, turns + place.start, rated, length_of(options.ep_len, n_turns)))
        return drawn

    def trajectory_loss(self, head: RewardHead, drawn: Drawn, calls: int = 1) -> TrajectoryLoss:
        """The loss of a head on the turns that were drawn of a trajectory: GELI's, or GE's alone.

        Args:
            calls: trajectories of this process in the batch, which share the encoder's memory.
        """
        i, turns, rated, length = drawn
        decomposition, score = DECOMPOSITIONS[self.options.redist_type], self.training.scores[i]
        outputs, hidden = head(self.features.training(turns, rated, calls), with_hidden=True)
        outputs = outputs.squeeze(1)
        rewards = head.rewards(outputs, len(turns))
        li = li_loss(rewards, torch.from_numpy(self.training.targets[turns]))
        shares = [torch.from_numpy(self.training.shares[turns])] if decomposition.uses_shares else []
        loss = decomposition.loss(outputs, score, length, *shares)
        if self.head.config.li:
            loss = geli_loss(loss, li.nan_to_num(), self.options.ge_weight, *self.scales)  # NaN: no turn has a target
        else:
            loss = loss / self.scales[0]
        ge = (score - predicted_return(rewards.detach(), length).item()) ** 2
        return TrajectoryLoss(loss, hidden, ge, li.item(), rewards)

    def contrastive_loss(self, drawn: list[Drawn], found: list[TrajectoryLoss]) -> torch.Tensor:
        """() The contrastive loss of all turns of these trajectories that have an LI target."""
        turns = np.concatenate([one.turns for one in drawn])
        known = ~np.isnan(self.training.targets[turns])
        return contrastive_term(torch.cat([one.hidden for one in found])[known], self.training.labels[turns][known])

    def decorrelation_loss(self, drawn: list[Drawn], found: list[TrajectoryLoss]) -> torch.Tensor:
        """() The penalty on the correlations of these trajectories' rewards with the surface of the turns' texts."""
        surface = self.surface[np.concatenate([one.turns for one in drawn])]
        rewards = torch.cat([one.rewards for one in found])
        return self.penalty * surface_correlations(rewards, surface, self.least).square().sum()

    def logged(self, drawn: list[Drawn], found: list[TrajectoryLoss]) -> dict[str, float]:
        """What is logged of the whole batch `drawn`, of which this process `found` its part."""
        mine = [(one.ge, one.li, one.rewards.detach().numpy()) for one in found]
        ge, li, rewards = zip(*gather_parts(mine, self.accelerator), strict=True)
        logged = {"train/loss": float(np.mean(ge))}
        if known := [value for value in li if not np.isnan(value)]:  # GE alone may have no faces
            logged["train/shaped_loss"] = float(np.mean(known))
        affects = self.training.affects[np.concatenate([one.turns for one in drawn])]
        return logged | affect_means(np.concatenate(rewards), affects, "train_shape/train")

    def after_step(self, step: int, logged: dict[str, float]) -> bool:
        """At the end of an epoch validates, and saves the head if it is the best (without validation: always)."""
        if step % self.epoch_steps:
            return False
        epoch, ge_loss = step // self.epoch_steps, None
        if self.validation is not None:
            features = self.features.held_out(self.validation.texts)
            metrics, *_ = measure(self.head, features, self.validation, self.options.ep_len)
            logged |= wandb_validation(metrics)
            ge_loss, best = metrics["ge_loss"], self.best["best_ge_loss"]
            if best is not None and ge_loss >= best:
                if self.options.patience and epoch - self.best["best_epoch"] >= self.options.patience:
                    self.best["steps"] = step
                return False
        self.best |= {"best_epoch": epoch, "best_ge_loss": ge_loss}
        self.save()
        return True

    @property
    def finished(self) -> bool:
        """Whether training has ended early, by `--patience`."""
        return self.best["steps"] < self.steps

    def batch_ids(self) -> list[str]:
        """Names of the trajectories in the last batch."""
        return [self.training.trajectories[i].key for i in self.batch]


if __name__ == "__main__":
    run(partial(main, OPTIONS))
