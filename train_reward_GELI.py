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

from data_utils import LI_SIGNALS, DataOptions, SignalOptions, TurnSet, fingerprint, load_turns, rating_probability
from geli.heads import STAGE_1_FOLDERS, find_head, load_reward_head
from geli.nets.options import EncoderOptions
from geli.run.errors import UserError, run
from geli.run.options import RunOptions, build_parser, flat, fraction, option, parse, positive_float, positive_int
from models import (
    DECOMPOSITIONS,
    HeadOptions,
    RewardHead,
    RewardHeadConfig,
    RewardTrainingOptions,
    check_reward_options,
)

_DECOMPOSITIONS = "; ".join(f"{name}: {row.help}" for name, row in DECOMPOSITIONS.items())
_SUBSET_DECOMPOSITIONS = [name for name, row in DECOMPOSITIONS.items() if row.uses_subset]


@dataclass(frozen=True)
class GELITrainingOptions(RewardTrainingOptions):
    """Options of training that only this stage has."""

    redist_type: str = option("RRD", f"how the score is decomposed. {_DECOMPOSITIONS}", choices=DECOMPOSITIONS)
    affect_path: str | None = option(
        None, "stage-1 run (name, or path of reward1_RUN) to start from; adds the LI loss", metavar="RUN"
    )
    ge_weight: float | None = option(
        None, "weight of GE; 1 - L is LI's (default: 0.5)", type=fraction, flag="--lambda", metavar="L"
    )
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
    K: int = option(
        160,
        f"turns drawn of a trajectory in a step (all when there are fewer), for {', '.join(_SUBSET_DECOMPOSITIONS)}; "
        "the others use all turns",
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


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """The options on the command line."""
    description = "Stage 2: learn turn rewards from the score (GE), with stage 1's affect (GELI) or without."
    parser = build_parser(description, Options())
    options = parse(parser, Options(), argv)
    training = options.training
    check_reward_options(parser.error, training, options.signal)
    if not training.train and not training.val:
        parser.error("nothing to do: give --train, --val or both")
    if training.reward_path and training.train:
        parser.error("--reward_path is a head to evaluate, with --val alone; to start training from one: --affect_path")
    if training.affect_path and not training.train:
        parser.error("--affect_path is where training starts; --val alone evaluates --reward_path")
    if training.ge_weight is not None and not training.affect_path:
        parser.error("--lambda weighs GE against LI, which --affect_path adds: give --affect_path")
    if training.contrastive and not training.affect_path:
        parser.error("--contrastive learns from the listener's affect: give --affect_path, as for all of LI")
    needs_training = {name: getattr(training, name) for name in ("contrastive", "curriculum", "curriculum_exposure")}
    for name, given in {**needs_training, "unfreeze": training.unfreeze, "resume": options.run.resume}.items():
        if given and not training.train:
            parser.error(f"--{name} changes training: give --train")
    if training.train and DECOMPOSITIONS[training.redist_type].uses_shares and not training.llm_shares:
        parser.error(f"--redist_type {training.redist_type} learns from a language model's shares: give --llm_shares")
    if training.llm_shares and not (training.train and DECOMPOSITIONS[training.redist_type].uses_shares):
        parser.error("--llm_shares is for --train --redist_type LLM")
    if training.ge_weight is None:
        options = replace(options, training=replace(training, ge_weight=0.5))
    return options


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else Options()

import numpy as np
import torch

from geli.data.shares import read_shares
from geli.heads import save_reward_head
from geli.nets.encoder import TurnEncoder, encoder_reference, load_encoder, load_encoder_of_head, place_encoder
from geli.nets.features import TurnFeatures, encoder_fingerprint
from geli.nets.pretrained import named_by_file
from geli.report.checks import conversations_seen, warn_of_constant_targets, warn_of_leaks
from geli.report.lineage import lineage_config
from geli.report.rewards import RewardRun, affect_means, evaluate, finish_run, wandb_validation
from geli.run.checkpoint import Checkpointer
from geli.run.distributed import frozen_dtype, gather_shares, local_share, make_accelerator, seed_everything
from geli.run.gradients import NotFinite, apply_gradients
from geli.run.lock import reward_run_to_resume
from geli.run.timing import Clock
from geli.run.tracking import Tracker
from geli.run.training import Stage, train_steps
from models import (
    contrastive_term,
    geli_loss,
    head_rewards,
    length_of,
    li_loss,
    loss_scales,
    predicted_return,
    predicted_returns,
    sample_turns,
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
    arguments, training_options = flat(options), options.training
    folder = output_folder(options, saved_path)
    lock = reward_run_to_resume(arguments, folder)
    trained_on = conversations_seen(saved_path, saved.config) if saved else frozenset()
    corpus, training, validation = load_turns(
        options.data, options.signal, cache=options.run.cache_dir, learns_li=bool(training_options.affect_path),
        val_except=trained_on if training_options.val_all else None, validate=training_options.val,
        trust_remote_code=options.run.trust_remote_code,
        shares=read_shares(training_options.llm_shares) if training_options.llm_shares else None,
    )  # fmt: skip
    warn_of_leaks(trained_on, validation.trajectories)
    if training_options.affect_path:
        warn_of_constant_targets(training, options.signal)
    clock.lap("reading conversations")
    encoder = find_encoder(options, accelerator, saved, saved_path)
    source = encoder.name
    described = {**arguments, "data": corpus.numbers(), "lineage": lineage_config(saved_path)}
    tracker = Tracker(folder.name, folder, described, options.run, accelerator, lock)
    features = TurnFeatures(encoder, accelerator, options.run.cache_dir, frozen=not training_options.unfreeze)
    clock.lap("loading the encoder")
    head, metrics, paths = saved, {}, []
    if training_options.train:
        head = new_head(options, folder, tracker.name, saved, encoder, training)
        metrics |= train(options, head, features, training, validation, tracker, folder, accelerator)
        accelerator.wait_for_everyone()
        paths.append(folder / f"reward1_{tracker.name}")
        head = load_reward_head(paths[0])  # the best one, from its file
        if training_options.unfreeze:
            paths.append(folder / f"lang_model_{tracker.name}")
            features.encoder = prepare_encoder(options, accelerator, load_trained(options, accelerator, paths[1]))
        clock.lap("encoding and training")
    redist_type, rewards, returns = head.config.redist_type, None, None
    if training_options.val:
        rewards = head_rewards(head, features.held_out(validation.texts), validation)
        returns = predicted_returns(validation, rewards, training_options.ep_len)
        metrics["validation"] = evaluate(validation, rewards, returns)
        mean_score_errors = (validation.scores - training.scores.mean()) ** 2
        metrics["validation"]["ge_loss_of_training_mean"] = float(mean_score_errors.mean())
        clock.lap("validation")
    method = f"{'GELI' if head.config.li else 'GE'}, {redist_type}" if head.config.stage == 2 else "LI"
    report = RewardRun(
        title=f"Stage {head.config.stage} ({method})", stage=2, encoder=source, arguments=arguments,
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
        path = find_head(training.affect_path, output_dir, STAGE_1_FOLDERS)
    elif training.reward_path:
        path = find_head(training.reward_path, output_dir)
    elif training.train:
        return None, None
    else:
        raise UserError("--val without --train evaluates a saved head: name it with --reward_path RUN")
    saved = load_reward_head(path)
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


def find_encoder(options: Options, accelerator, saved: RewardHead | None, path: Path | None) -> TurnEncoder:
    """The encoder that the saved head was trained on, else the one that the options name, on its device."""
    dtype, trust = frozen_dtype(accelerator), options.run.trust_remote_code
    max_length, named = options.encoder.max_length, options.encoder.lang_model_path
    if saved:
        encoder = load_encoder_of_head(saved.config, path, max_length, named, dtype, trust)
    else:
        source, option_name = options.encoder.source()
        adapt = options.training.unfreeze and options.encoder.adapted
        encoder = load_encoder(source, max_length, option_name, adapt, dtype, trust)
    return prepare_encoder(options, accelerator, encoder, trains=options.training.unfreeze)


def load_trained(options: Options, accelerator, path: Path) -> TurnEncoder:
    """The encoder that this run trained and wrote."""
    dtype, trust = frozen_dtype(accelerator), options.run.trust_remote_code
    return load_encoder(str(path), options.encoder.max_length, dtype=dtype, trust_remote_code=trust)


def prepare_encoder(options: Options, accelerator, encoder: TurnEncoder, trains: bool = False) -> TurnEncoder:
    """The encoder on its device, run as the options say."""
    return place_encoder(encoder, accelerator, options.encoder.tokens_per_batch, options.encoder.compile, trains)


def new_head(
    options: Options, folder: Path, run_name: str, saved: RewardHead | None, encoder: TurnEncoder, training: TurnSet
) -> RewardHead:
    """The head to train: stage 1's, or a fresh one if there is none or the decomposition needs its own kind."""
    required = DECOMPOSITIONS[options.training.redist_type].head
    trained_encoder = {"encoder": f"lang_model_{run_name}", "encoder_is_folder": True}
    head = RewardHead(
        RewardHeadConfig(
            head=required or options.head.chosen,
            hidden=encoder.hidden_size,
            **(trained_encoder if options.training.unfreeze else encoder_reference(encoder.name, folder)),
            max_length=encoder.max_length,
            context_turns=options.data.context_turns,
            stage=2,
            reward_class=options.data.reward_class,
            redist_type=options.training.redist_type,
            li=saved is not None,
            li_signal=options.signal.li_signal,
            sentiment_model=options.signal.sentiment_model,
            ep_len=options.training.ep_len,
        )
    )
    if required:
        if options.head.chosen != "default":
            print(f"--{options.head.chosen} is not used: {options.training.redist_type} has a network of its own")
        head.init_constant(float(training.scores.mean()))
    elif saved and saved.config.head != head.config.head:
        raise UserError(
            f"--affect_path {options.training.affect_path}: its head is of the kind {saved.config.head}, the options "
            f"ask for {head.config.head}; give the options that it was trained with"
        )
    elif saved:
        head.load_state_dict(saved.state_dict())
    return head


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(
    options: Options,
    head: RewardHead,
    features: TurnFeatures,
    training: TurnSet,
    validation: TurnSet,
    tracker: Tracker,
    folder: Path,
    accelerator,
) -> dict:
    """Trains the head (with `--unfreeze` also the encoder), saves the best by GE loss, and returns
    {"steps", "best_epoch", "best_ge_loss"}."""
    frozen = not options.training.unfreeze

    def save() -> None:
        if not frozen:
            features.encoder.save(folder / f"lang_model_{tracker.name}")
        save_reward_head(head, folder / f"reward1_{tracker.name}")

    held_out = validation if options.training.val else None
    stage = GELITraining(head, features, training, held_out, options.training, accelerator, options.run.seed, save)
    inputs = {"data": fingerprint(training.trajectories + validation.trajectories)}
    if training.shares is not None:
        inputs["shares"] = hashlib.sha256(training.shares.tobytes()).hexdigest()
    modules = {"head": head}
    if frozen:
        inputs["encoder"] = encoder_fingerprint(features.encoder, "")
    else:  # its weights are in the checkpoint
        modules["encoder"] = features.encoder.encoder
    checkpointer = Checkpointer(
        tracker.lock, accelerator, modules=modules, optimizer=stage.optimizer,
        values={"schedule": stage.schedule, "best": stage.best, "order": stage.order, "logged": tracker.logged},
        generators={"training": stage.rng}, inputs=inputs, every=options.run.save_steps, total=stage.steps,
    )  # fmt: skip
    train_steps(stage, stage.steps, "stage 2", checkpointer, tracker)
    return dict(stage.best)


class GELITraining(Stage):
    """Trains a head on the GELI loss (or GE alone), with a learning rate that decays linearly to 0.

    Args:
        head: trained in place; its configuration says whether it learns LI. features: of turns; trains the encoder too
            unless it is frozen.
        training: turns to train on. validation: turns to choose the best epoch by; None: the last epoch is saved.
        options: of training. accelerator: `accelerate.Accelerator`. seed: of the order of conversations and of subsets.
        save: called when the head is the best so far.

    Attributes:
        steps: optimizer steps. best: {"best_epoch", "best_ge_loss", "steps"}.
    """

    def __init__(
        self,
        head: RewardHead,
        features: TurnFeatures,
        training: TurnSet,
        validation: TurnSet | None,
        options: GELITrainingOptions,
        accelerator,
        seed: int,
        save: Callable[[], None],
    ):
        self.head, self.features, self.training, self.validation = head, features, training, validation
        self.options, self.accelerator, self.save = options, accelerator, save
        self.rng = np.random.default_rng(seed)
        conversations: dict[str, list[int]] = {}
        for i, trajectory in enumerate(training.trajectories):
            conversations.setdefault(trajectory.conversation.id, []).append(i)
        self.conversations = list(conversations.values())  # the trajectories of each
        self.epoch_steps = -(-len(self.conversations) // options.batch_size)
        self.steps = options.epochs * self.epoch_steps
        self.order: dict[str, list[int]] = {}  # of the conversations in this epoch
        self.scales = loss_scales(options.loss_scale, options.redist_type, options.ep_len, training)
        shows_rating = options.curriculum or options.curriculum_exposure
        features.prepare(training.texts, training.rated_texts() if shows_rating else None)
        groups = [{"params": list(head.parameters()), "lr": options.learning_rate}]
        if options.unfreeze:
            groups.append({"params": features.encoder.trainable(), "lr": options.encoder_learning_rate})
        sharded = features.encoder.max_over_ranks is not None  # foreach cannot mix sharded parameters with whole ones
        self.optimizer = torch.optim.AdamW(groups, foreach=False if sharded else None)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, total_iters=self.steps)
        self.best = {"steps": self.steps, "best_epoch": 0, "best_ge_loss": None}
        head.train()
        features.encoder.train(options.unfreeze)

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step on the trajectories of a few conversations."""
        epoch, place = divmod(step - 1, self.epoch_steps)
        if place == 0:
            self.order["groups"] = self.rng.permutation(len(self.conversations)).tolist()
        size = self.options.batch_size
        batch = self.order["groups"][place * size : (place + 1) * size]
        self.batch = [i for conversation in batch for i in self.conversations[conversation]]
        loss, logged = self.batch_loss(epoch + 1)
        if loss.requires_grad:
            loss.backward()
        if not np.isfinite(logged["train/loss"] + logged.get("train/shaped_loss", 0.0)):
            raise NotFinite("the loss or its gradient")
        logged["train/gradient_norm"] = apply_gradients(self.optimizer, self.accelerator, self.schedule)
        return logged

    def sample(self, epoch: int) -> list[tuple[int, np.ndarray, np.ndarray, float]]:
        """Of each trajectory in the batch: its index, the turns that are used, which of them show the user's rating,
        and its length L. Every process draws all of them, so that their generators stay the same."""
        options, drawn = self.options, []
        share = rating_probability(options.curriculum, options.curriculum_exposure, epoch, options.epochs)
        for i in self.batch:
            place = self.training.turns_of(i)
            n_turns = place.stop - place.start
            uses_subset = DECOMPOSITIONS[options.redist_type].uses_subset
            turns = sample_turns(n_turns, options.K, self.rng) if uses_subset else np.arange(n_turns)
            rated = self.rng.random(len(turns)) < share if share else np.zeros(len(turns), dtype=bool)
            drawn.append((i, turns + place.start, rated, length_of(options.ep_len, n_turns)))
        return drawn

    def batch_loss(self, epoch: int) -> tuple[torch.Tensor, dict[str, float]]:
        """This process' part of the batch's loss (), scaled so that its sum over processes is the batch's mean, and
        what is logged of the whole batch."""
        drawn = self.sample(epoch)
        mine = local_share(drawn, self.accelerator)
        losses, hidden_layers, seen = [torch.zeros(())], [], []
        for i, turns, rated, length in mine:
            loss, hidden, found = self.trajectory_loss(i, turns, rated, length, len(mine))
            losses.append(loss)
            hidden_layers.append(hidden)
            seen.append(found)
        most = -(-len(drawn) // self.accelerator.num_processes)
        for _ in range(len(mine), most):  # sharded layers need the same number of passes in every process
            _, turns, rated, _ = drawn[0]
            losses.append(self.features.training(turns[:0], rated[:0], 1).sum())
        loss, contrast = torch.stack(losses).sum() / len(drawn), torch.zeros(())
        contrastive = self.options.contrastive and epoch % 2 == 0
        if contrastive and seen:
            labels = self.training.labels[np.concatenate([turns for turns, *_ in seen])]
            contrast = contrastive_term(torch.cat(hidden_layers), labels) * len(seen) / len(drawn)
            loss = loss + contrast
        turns, ge, li, rewards = zip(*gather_shares(seen, self.accelerator), strict=True)
        logged = {"train/loss": float(np.mean(ge))}
        if known := [value for value in li if not np.isnan(value)]:  # GE alone may have no faces
            logged["train/shaped_loss"] = float(np.mean(known))
        if contrastive:
            logged["train/contrastive_loss"] = contrast.item()
        affects = self.training.affects[np.concatenate(turns)]
        return loss, logged | affect_means(np.concatenate(rewards), affects, "train_shape/train")

    def trajectory_loss(self, i: int, turns: np.ndarray, rated: np.ndarray, length: float, parts: int):
        """The loss () of trajectory i on these turns, the head's hidden layer, and (turns, GE, LI, rewards) to log.

        Args:
            turns: (k,) indices. rated: (k,) bool, which of them show the user's rating. length: L in turns.
            parts: trajectories of this process in the batch, which share the encoder's memory.
        """
        decomposition = DECOMPOSITIONS[self.options.redist_type]
        outputs, hidden = self.head(self.features.training(turns, rated, parts), with_hidden=True)
        outputs, score = outputs.squeeze(1), self.training.scores[i]
        rewards = self.head.rewards(outputs, len(turns))
        li = li_loss(rewards, torch.from_numpy(self.training.targets[turns]))
        shares = [torch.from_numpy(self.training.shares[turns])] if decomposition.uses_shares else []
        loss = decomposition.loss(outputs, score, length, *shares)
        if self.head.config.li:
            loss = geli_loss(loss, li, self.options.ge_weight, *self.scales)
        else:
            loss = loss / self.scales[0]
        ge = (score - predicted_return(rewards.detach(), length).item()) ** 2
        return loss, hidden, (turns, ge, li.item(), rewards.detach().numpy())

    def after_step(self, step: int, logged: dict[str, float]) -> bool:
        """At the end of an epoch validates, and saves the head if it is the best (without validation: always)."""
        if step % self.epoch_steps:
            return False
        ge_loss = None
        if self.validation is not None:
            rewards = head_rewards(self.head, self.features.held_out(self.validation.texts), self.validation)
            options = self.options
            returns = predicted_returns(self.validation, rewards, options.ep_len)
            metrics = evaluate(self.validation, rewards, returns)
            logged |= wandb_validation(metrics)
            ge_loss, best = metrics["ge_loss"], self.best["best_ge_loss"]
            if best is not None and ge_loss >= best:
                return False
        self.best |= {"best_epoch": step // self.epoch_steps, "best_ge_loss": ge_loss}
        self.save()
        return True

    def batch_ids(self) -> list[str]:
        """Names of the trajectories in the last batch."""
        return [self.training.trajectories[i].key for i in self.batch]


if __name__ == "__main__":
    run(partial(main, OPTIONS))
