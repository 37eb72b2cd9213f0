"""Stage 1 (LI): learns a reward for every turn from the listener's reaction alone, by predicting it from the text.

The reaction is the listener's face, or what another `--li_signal` says.

    python train_reward_LI_only.py --reward_class overall_affect --model convo --batch_size 32 --K 32 \\
        --train_size 500 --val --small_model_shrink

Trains the encoder and a reward head on every agent turn of both trajectories of a conversation, and writes
`reward1_{run}` and `lang_model_{run}/`, from which stages 2 and 3 start.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_utils import DataOptions, SignalOptions, TurnSet, fingerprint, load_turns, rating_probability
from geli.nets.options import EncoderOptions
from geli.run.errors import run
from geli.run.options import RunOptions, flat, option, positive_int, read_options, refuse
from models import HeadOptions, RewardHead, RewardTrainingOptions, refuse_unused

VALIDATE_EVERY = 500  # steps


@dataclass(frozen=True)
class LITrainingOptions(RewardTrainingOptions):
    """Options of training that only this stage has."""

    batch_size: int = option(32, "turns a step", type=positive_int)
    K: int = option(32, "turns of each trajectory validated on in training", type=positive_int)
    unfreeze: bool = option(False, "name the folder as published for it (the encoder is always trained here)")


@dataclass(frozen=True)
class PublishedOptions:
    """Options that change nothing."""

    title = "accepted for the published commands, without effect here"
    train: bool = option(False, "this stage always trains")


@dataclass(frozen=True)
class Options:
    """All options of this command."""

    data: DataOptions = DataOptions()
    signal: SignalOptions = SignalOptions(li_signal="face")
    encoder: EncoderOptions = EncoderOptions()
    head: HeadOptions = HeadOptions()
    training: LITrainingOptions = LITrainingOptions()
    run: RunOptions = RunOptions(save_steps=500)
    published: PublishedOptions = PublishedOptions()


PRESETS = {  # choices of --preset
    None: Options(),
    "small": Options(
        data=DataOptions(context_turns=3), training=LITrainingOptions(learning_rate=1e-4, epochs=3),
    ),
}  # fmt: skip


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """The options on the command line."""
    description = "Stage 1: learn turn rewards from the listener's face (LI), encoder and head."
    options, parser, given = read_options(description, PRESETS, argv)
    unused = partial(refuse, parser, given)
    refuse_unused(unused, options.training, options.signal)
    if not options.training.val:
        unused("K", "nothing is validated: give --val")
    return options


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else Options()

import numpy as np
import torch

from geli.heads import load_reward_head, save_reward_head
from geli.nets.batching import shuffled_batches
from geli.nets.encoder import TurnEncoder, open_encoder
from geli.nets.features import encode_together, encoder_fingerprint
from geli.nets.pretrained import check_exists
from geli.report.checks import check_li_targets
from geli.report.rewards import RewardRun, affect_means, choose_turns, finish_run, measure, wandb_validation
from geli.run.checkpoint import Checkpointer
from geli.run.distributed import gather_parts, local_part, make_accelerator, seed_everything
from geli.run.gradients import apply_gradients, decaying_adamw
from geli.run.lock import reward_run_to_resume
from geli.run.tracking import Tracker
from geli.run.training import Clock, Stage, train_steps
from models import contrastive_term, head_config, length_of, li_loss


def main(options: Options) -> None:
    """Reads the data, trains encoder and head, evaluates the best ones, and writes what was measured."""
    arguments, clock = flat(options), Clock()
    seed_everything(options.run.seed)
    accelerator = make_accelerator(options.run.device, options.run.dtype)
    folder = Path(options.run.output_dir) / project_name(options)
    check_exists(*options.encoder.source())
    lock = reward_run_to_resume(arguments, folder)
    corpus, training, validation = load_turns(
        options.data, options.signal, cache=options.run.cache_dir,
        val_except=frozenset() if options.training.val_all else None, validate=options.training.val,
        trust_remote_code=options.run.trust_remote_code,
    )  # fmt: skip
    check_li_targets(training, options.signal)
    clock.lap("reading conversations")
    load = partial(open_encoder, options.encoder, accelerator, options.run.trust_remote_code)
    encoder = load(trains=True)
    source = encoder.name
    tracker = Tracker(folder.name, folder, {**arguments, "data": corpus.numbers()}, options.run, accelerator, lock)
    paths = [folder / f"reward1_{tracker.name}", folder / f"lang_model_{tracker.name}"]
    metrics = train(options, encoder, training, validation, tracker, paths, accelerator, clock)
    rewards = returns = None
    if options.training.val:  # of the files that were written
        encoder = load(name=str(paths[1]))
        features = encode_together(encoder, encoder.tokenize(validation.texts), accelerator, progress="validation")
        found = measure(load_reward_head(paths[0]), features, validation, options.training.ep_len)
        metrics["validation"], rewards, returns = found
        clock.lap("validation")
    report = RewardRun(
        title="Stage 1 (LI)", stage=1, method="LI", encoder=source, arguments=arguments, defaults=flat(Options()),
        corpus=corpus, training=training, validation=validation, metrics=metrics, rewards=rewards, returns=returns,
        paths=paths, started_from=None, seconds=clock.seconds,
    )  # fmt: skip
    finish_run(report, tracker, folder)


def project_name(options: Options) -> str:
    """wandb's project, which is also the folder's name."""
    model, reward_class, training = Path(options.encoder.model).name, options.data.reward_class, options.training
    if training.unfreeze:
        return f"reward_function_{model}_160_scaled_{reward_class}"
    return (
        f"SINGLE_INDEX_reward_function_{model}_{reward_class}_contra_{training.contrastive}"
        f"_shrink_{options.head.hard_shrink}_curriculum_{training.curriculum}"
        f"_curriculum_exposure{training.curriculum_exposure}"
    )


def train(
    options: Options, encoder: TurnEncoder, training: TurnSet, validation: TurnSet, tracker: Tracker,
    paths: list[Path], accelerator, clock: Clock,
) -> dict:  # fmt: skip
    """Trains the encoder and a new head, saves the best by LI loss to `paths` (of the head, of the encoder), and
    returns {"steps", "best_step", "best_li_loss"}."""
    trained = {"encoder": paths[1].name, "encoder_is_folder": True}
    head = RewardHead(head_config(options, encoder, head=options.head.chosen, stage=1, **trained))
    head.init_constant(min(max(float(np.nanmean(training.targets)), -0.95), 0.95))  # inside tanh's range
    head.to(accelerator.device)

    def save() -> None:
        encoder.save(paths[1])
        save_reward_head(head, paths[0])

    held_out = validation if options.training.val else None
    stage = LITraining(encoder, head, training, held_out, options.training, accelerator, options.run.seed, save)
    inputs = {"data": fingerprint(training.trajectories + validation.trajectories)}
    if encoder.has_frozen_layers:  # which are not in the checkpoint
        inputs["encoder"] = encoder_fingerprint(encoder, "")
    checkpointer = Checkpointer(
        tracker.lock, accelerator, modules={"encoder": encoder.encoder, "head": head}, optimizer=stage.optimizer,
        values={"schedule": stage.schedule, "best": stage.best, "logged": tracker.logged},
        generators={"training": stage.rng},
        inputs=inputs,
        every=options.run.save_steps, total=stage.steps,
    )  # fmt: skip
    clock.lap("loading and tokenizing")
    train_steps(stage, stage.steps, "stage 1", checkpointer, tracker)
    accelerator.wait_for_everyone()
    clock.lap("training")
    return dict(stage.best)


class LITraining(Stage):
    """Trains encoder and head, in place, on the LI loss, with a learning rate that decays linearly to 0.

    Args:
        validation: turns to choose the best step by; None: the last step is saved. seed: of the order of turns.
        save: called when encoder and head are the best so far.

    Attributes:
        steps: optimizer steps, if `--patience` does not end training.
        best: {"best_step", "best_li_loss", "steps"}, the last being the steps that were done or are to be done.
    """

    def __init__(
        self, encoder: TurnEncoder, head: RewardHead, training: TurnSet, validation: TurnSet | None,
        options: LITrainingOptions, accelerator, seed: int, save: Callable[[], None],
    ):  # fmt: skip
        self.encoder, self.head, self.training, self.validation = encoder, head, training, validation
        self.options, self.accelerator, self.save = options, accelerator, save
        self.rng = np.random.default_rng(seed)
        self.shows_rating = options.curriculum or options.curriculum_exposure
        self.pairs = encoder.tokenize(training.texts)
        self.rated_pairs = encoder.tokenize(training.rated_texts()) if self.shows_rating else self.pairs
        lengths = np.array([len(pair.ids) for pair in self.pairs])
        known = np.flatnonzero(~np.isnan(training.targets))  # the others have nothing to learn from
        if options.epochs > 1:
            shown = [self.rated_pairs] if self.shows_rating else []
            shown += [self.pairs] if options.curriculum_exposure or not shown else []
            encoder.remember([pairs[i] for pairs in shown for i in known], accelerator.autocast)
        self.batches = [
            (epoch, known[batch])
            for epoch in range(1, options.epochs + 1)
            for batch in shuffled_batches(lengths[known], options.batch_size, self.rng)
        ]
        self.steps = len(self.batches)
        self.every = min(VALIDATE_EVERY, self.steps // options.epochs) if options.patience else VALIDATE_EVERY
        n_turns = np.diff(training.offsets)  # the score and the length that belong to each turn, for the logged GE loss
        self.scores = np.repeat(training.scores, n_turns)
        self.lengths = np.repeat([length_of(options.ep_len, n) for n in n_turns], n_turns)
        if validation is not None:
            self.chosen = choose_turns(validation, options.K, seed)
            self.chosen_pairs = encoder.tokenize([validation.texts[i] for i in np.flatnonzero(self.chosen)])
        group = {"params": [*encoder.trainable(), *head.parameters()], "lr": options.learning_rate}
        self.optimizer, self.schedule = decaying_adamw([group], self.steps)
        self.best = {"best_step": 0, "best_li_loss": None, "steps": self.steps}
        encoder.train()
        head.train()

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step on a batch of turns, of which each process computes a part."""
        epoch, self.batch = self.batches[step - 1]
        pairs = self.batch_pairs(epoch, self.batch)
        contrastive = self.options.contrastive and epoch % 2 == 0
        mine = local_part(list(range(len(self.batch))), self.accelerator)
        features = self.encoder.encode_with_gradients([pairs[i] for i in mine], self.accelerator.autocast)
        losses, rewards = features.sum().expand(2), torch.zeros(0)
        if mine:
            losses, rewards = self.losses(features, self.batch[mine], contrastive)
            losses = losses * (len(mine) / len(self.batch))  # the sum over processes is the batch's mean
        if losses.requires_grad:
            losses.sum().backward()
        li, contrast = self.accelerator.reduce(losses.detach().to(self.accelerator.device), "sum").tolist()
        logged = {"train/shaped_loss": li}
        logged["train/gradient_norm"] = apply_gradients(self.optimizer, self.accelerator, self.schedule)
        if contrastive:
            logged["train/contrastive_loss"] = contrast
        predicted = np.array(gather_parts(rewards.tolist(), self.accelerator), dtype=np.float32)
        scores, lengths = self.scores[self.batch], self.lengths[self.batch]
        logged["train/loss"] = float(np.mean((scores - lengths * predicted) ** 2))  # RRD's, with subsets of 1 turn
        logged["train/learning_rate"] = self.schedule.get_last_lr()[0]
        return logged | affect_means(predicted, self.training.affects[self.batch], "train_shape/train")

    def losses(self, features: torch.Tensor, turns: np.ndarray, contrastive: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The two losses (2,) of turns (n,) with features (n, hidden), whose sum is minimized: of LI, and the
        contrastive one, which is 0 unless `contrastive`; and the rewards (n,)."""
        with self.accelerator.autocast():
            rewards, hidden = self.head(features, with_hidden=True)
        rewards = rewards.squeeze(1).float()
        li = li_loss(rewards, torch.from_numpy(self.training.targets[turns]).to(rewards.device))
        contrast = contrastive_term(hidden, self.training.labels[turns]) if contrastive else torch.zeros_like(li)
        return torch.stack([li, contrast]), rewards.detach()

    def batch_pairs(self, epoch: int, batch: np.ndarray) -> list:
        """The tokenised texts of a batch, of which the curriculum options show some with the user's rating."""
        if not self.shows_rating:
            return [self.pairs[i] for i in batch]
        options = self.options
        probability = rating_probability(options.curriculum, options.curriculum_exposure, epoch, options.epochs)
        shown = self.rng.random(len(batch)) < probability
        return [
            (self.rated_pairs if with_rating else self.pairs)[i] for i, with_rating in zip(batch, shown, strict=True)
        ]

    def after_step(self, step: int, logged: dict[str, float]) -> bool:
        """Validates every so many steps and at the end, and saves the best step (else the last)."""
        last = step == self.steps
        if self.validation is not None and (step % self.every == 0 or last):
            features = encode_together(self.encoder, self.chosen_pairs, self.accelerator)
            metrics, *_ = measure(self.head, features, self.validation, self.options.ep_len, self.chosen)
            logged |= wandb_validation(metrics)
            if self.best["best_li_loss"] is None or metrics["li_loss"] < self.best["best_li_loss"]:
                self.best |= {"best_step": step, "best_li_loss": metrics["li_loss"]}
            elif self.options.patience and step - self.best["best_step"] >= self.options.patience * self.every:
                self.best["steps"] = step
        improved = self.best["best_step"] == step or (last and self.validation is None)
        if improved:
            self.best["best_step"] = step
            self.save()
        return improved

    @property
    def finished(self) -> bool:
        """Whether training has ended early, by `--patience`."""
        return self.best["steps"] < self.steps

    def batch_ids(self) -> list[str]:
        """Names of the turns in the last batch."""
        return self.training.ids(self.batch)


if __name__ == "__main__":
    run(partial(main, OPTIONS))
