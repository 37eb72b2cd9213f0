"""Stage 2 (GELI): turn rewards that add up to the score (GE) and follow the listener's face (LI).

    python train_reward_GELI.py --redist_type RRD --reward_class overall_affect --model convo --batch_size 1 --K 160 \\
        --train_size 100 --train --val --small_model_shrink --affect_path devout-brook-114

With `--affect_path RUN` the head and the encoder start from that stage-1 run and the loss is lambda GE + (1-lambda) LI;
without it the loss is GE alone. The encoder is frozen, so every turn is encoded once; `--unfreeze` trains it too.
"""

from functools import partial
from pathlib import Path

from cli import (
    ADAPTED,
    HEAD_OPTIONS,
    UserError,
    add_common_options,
    add_reward_options,
    cache_folder,
    check_reward_options,
    fraction,
    head_name,
    named_encoder,
    new_parser,
    positive_float,
    positive_int,
    run,
)

REDIST_TYPES = {
    "RRD": "random subsets of K turns estimate the return",
    "IRCR": "every turn regresses to R/L",
    "RUDDER": "an LSTM predicts the return after every turn; rewards are its differences",
}


def build_parser():
    """The options."""
    parser = new_parser("Stage 2: learn turn rewards from the score (GE), with stage 1's affect (GELI) or without.")
    add = parser.add_argument
    types = "; ".join(f"{name}: {what}" for name, what in REDIST_TYPES.items())
    add("--redist_type", choices=REDIST_TYPES, default="RRD", help=f"how the score is decomposed. {types}")
    add("--affect_path", metavar="RUN", help="stage-1 run (name, or path of reward1_RUN) to start from; brings LI")
    add("--lambda", type=fraction, dest="ge_weight", metavar="L", help="weight of GE; 1 - L is LI's (default: 0.5)")
    add(
        "--loss_scale",
        choices=("raw", "normalized"),
        default="raw",
        help="normalized divides each loss by the variance of its own target over the training set",
    )
    add("--reward_path", metavar="HEAD", help="with --val alone: the saved head to evaluate (run name or path)")
    add_reward_options(parser, epochs=4)
    add("--batch_size", type=positive_int, default=1, help="conversations a step")
    add("--K", type=positive_int, default=160, help="RRD: turns of a trajectory in a step (all when there are fewer)")
    add("--unfreeze", action="store_true", help="train the encoder too, and save it as lang_model_RUN")
    add("--encoder_learning_rate", type=positive_float, default=5e-6, help="the encoder's, with --unfreeze")
    add_common_options(parser, learning_rate=5e-3, context_turns=20, save_steps=100)
    return parser


def parse():
    """The command line."""
    parser = build_parser()
    args = parser.parse_args()
    check_reward_options(parser, args)
    if not args.train and not args.val:
        parser.error("nothing to do: give --train, --val or both")
    if args.reward_path and args.train:
        parser.error(
            "--reward_path is a head to evaluate, with --val and without --train; --affect_path starts training"
        )
    if args.affect_path and not args.train:
        parser.error("--affect_path is where training starts; --val alone evaluates --reward_path")
    if args.ge_weight is not None and not args.affect_path:
        parser.error("--lambda weighs GE against LI, and LI comes with --affect_path")
    if args.contrastive and not args.affect_path:
        parser.error("--contrastive learns from the listener's affect: give --affect_path, as for all of LI")
    for name in ("contrastive", "curriculum", "curriculum_exposure", "unfreeze", "resume"):
        if getattr(args, name) and not args.train:
            parser.error(f"--{name} changes training: give --train")
    args.ge_weight = 0.5 if args.ge_weight is None else args.ge_weight
    return args


def project_name(args) -> str:
    """wandb's project, which is also the folder's name."""
    kind = "visual_feedback_baselines" if args.affect_path else "baselines"
    return f"{kind}_{Path(args.model).name}_{args.reward_class}_baseline_{args.redist_type}_K_{args.K}"


def main() -> None:
    """Parse, build, train, evaluate, write."""
    args = parse()

    from evaluation import evaluate, finish_run, head_rewards, load_data, place_encoder, write_validation
    from models import load_encoder, load_reward_head
    from runs import Tracker, frozen_dtype, make_accelerator, seed_everything
    from states import reward_run_to_resume
    from untrusted import named_by_file

    seed_everything(args.seed)
    accelerator = make_accelerator(args.device, args.dtype)
    folder = Path(args.output_dir) / project_name(args)
    saved, path = load_saved(args)
    if args.li_signal is None:
        args.li_signal = saved.config.li_signal if saved else "face"
        if saved and saved.config.sentiment_model and not args.sentiment_model:
            args.sentiment_model = named_by_file(saved.config.sentiment_model, path)
    if args.sentiment_model and args.li_signal == "face":
        raise UserError("--sentiment_model is for --li_signal sentiment, and this run learns from the face")
    if saved and not args.train:  # a saved head is evaluated as it was trained
        args.context_turns, args.max_length = saved.config.context_turns, saved.config.max_length
        folder = Path(args.output_dir) / path.resolve().parent.name
    claim = reward_run_to_resume(args, folder)
    seen = conversations_seen(path, saved)
    corpus, training, validation = load_data(args, seen)
    warn_of_leaks(seen, validation)
    encoder = find_encoder(args, saved, path, frozen_dtype(accelerator))
    place_encoder(encoder, args, accelerator, trains=args.unfreeze)
    encoder_name = encoder.name
    described = {**vars(args), "data": corpus.numbers()}
    tracker = Tracker(folder.name, folder, described, args.run_name, accelerator, claim)
    head_path, encoder_path = folder / f"reward1_{tracker.name}", folder / f"lang_model_{tracker.name}"
    head = new_head(args, folder, saved, encoder, encoder_path, training) if args.train else saved

    turns = Encoded(args, encoder, accelerator)
    metrics, paths, rewards = {}, [], None
    if args.train:
        metrics |= train(args, head, turns, training, validation, tracker, head_path, encoder_path)
        accelerator.wait_for_everyone()
        head = load_reward_head(head_path)  # the best, as it was written
        paths.append(head_path)
        if args.unfreeze:
            best = load_encoder(
                str(encoder_path),
                args.max_length,
                dtype=frozen_dtype(accelerator),
                trust_remote_code=args.trust_remote_code,
            )
            turns.encoder = place_encoder(best, args, accelerator)
            paths.append(encoder_path)
    redist = head.config.redist_type
    if args.val:
        rewards = head_rewards(head, turns.held_out(validation), validation)
        metrics["validation"] = evaluate(validation, rewards, args.ep_len, redist)
        mean_score = training.scores.mean()
        metrics["validation"]["ge_loss_of_training_mean"] = float(((validation.scores - mean_score) ** 2).mean())
        paths += write_validation(folder, tracker.name, validation, rewards, args.ep_len, redist)
    kind = f"{'GELI' if head.config.li else 'GE'}, {redist}" if head.config.stage == 2 else "LI"
    title = f"Stage {head.config.stage} ({kind})"
    parts = (training, validation)
    finish_run(title, args, tracker, folder, corpus, parts, metrics, rewards, paths, stage=2, encoder=encoder_name)


def find_head(name: str, output_dir: str, folders: str = "*") -> Path:
    """The head file that a run name (of a run in `output_dir`, in a folder like `folders`) or a path means.

    Raises:
        UserError: if there is none, or the run name is in more than one folder.
    """
    path = Path(name)
    if path.is_file():
        return path
    found = sorted(path for path in saved_heads(output_dir, folders) if path.name == f"reward1_{name}")
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{name}: {len(found)} runs have that name; give one's path: {', '.join(map(str, found))}")
    known = sorted(path.name.removeprefix("reward1_") for path in saved_heads(output_dir, folders))
    raise UserError(
        f"{name}: expected a run name or the path of a reward1_ file, found neither under {output_dir}; "
        f"runs there: {', '.join(known) or 'none'}"
    )


def saved_heads(output_dir: str, folders: str) -> list[Path]:
    """The reward heads in the folders of `output_dir` that match the pattern `folders`."""
    return [path for path in Path(output_dir).glob(f"{folders}/reward1_*") if not path.name.endswith(".json")]


STAGE_1_FOLDERS = "*reward_function_*"


def load_saved(args):
    """The saved head that the options name, to start from or to evaluate, and its path; None, None without one."""
    from models import load_reward_head

    if args.affect_path:
        path = find_head(args.affect_path, args.output_dir, STAGE_1_FOLDERS)
    elif args.reward_path:
        path = find_head(args.reward_path, args.output_dir)
    elif args.train:
        return None, None
    else:
        raise UserError("--val without --train evaluates a saved head: name it with --reward_path RUN")
    saved = load_reward_head(path)
    if args.affect_path and saved.config.stage != 1:
        raise UserError(f"--affect_path {args.affect_path}: expected a stage-1 head, {path} is of stage 2")
    learned = saved.config.reward_class
    if args.reward_path and learned not in (None, args.reward_class):
        raise UserError(f"{path}: was trained for {learned}, not {args.reward_class}: give --reward_class {learned}")
    return saved, path


def find_encoder(args, saved, path: Path | None, dtype):
    """The encoder that the saved head at `path` was trained on, or else the one that the options name."""
    from models import load_encoder, load_encoder_of_head

    if saved:
        named = args.lang_model_path
        return load_encoder_of_head(saved, path, args.max_length, named, dtype, args.trust_remote_code)
    name, option = named_encoder(args)
    adapt = args.unfreeze and args.model in ADAPTED
    return load_encoder(name, args.max_length, option, adapt, dtype, args.trust_remote_code)


def new_head(args, folder: Path, saved, encoder, encoder_path: Path, training):
    """The head to train: stage 1's, or a fresh one where there is none or the decomposition needs a kind of its own."""
    from models import DECOMPOSITIONS, RewardHead, RewardHeadConfig, encoder_reference

    own = DECOMPOSITIONS[args.redist_type].head
    reference = {"encoder": encoder_path.name, "encoder_is_folder": True}
    head = RewardHead(
        RewardHeadConfig(
            head=own or head_name(args),
            hidden=encoder.hidden_size,
            **(reference if args.unfreeze else encoder_reference(encoder.name, folder)),
            max_length=encoder.max_length,
            context_turns=args.context_turns,
            stage=2,
            reward_class=args.reward_class,
            redist_type=args.redist_type,
            li=saved is not None,
            li_signal=args.li_signal,
            sentiment_model=args.sentiment_model,
        )
    )
    if own:
        chosen = [f"--{name}" for name in HEAD_OPTIONS if getattr(args, name)]
        if chosen:
            print(f"{chosen[0]} is not used: {args.redist_type} has a network of its own")
        head.start_at(float(training.scores.mean()))
    elif saved and saved.config.head != head.config.head:
        raise UserError(
            f"--affect_path {args.affect_path}: its head is of the kind {saved.config.head}, the options ask for "
            f"{head.config.head}; give the options that it was trained with"
        )
    elif saved:
        head.load_state_dict(saved.state_dict())
    return head


class Encoded:
    """Turns as features: of a frozen encoder computed once and kept on disk, of one that trains whenever asked.

    Args:
        args: the options. encoder: a `TurnEncoder`. accelerator: `accelerate.Accelerator`.
    """

    def __init__(self, args, encoder, accelerator):
        from cache import FeatureCache, encoder_fingerprint
        from runs import device_name

        self.args, self.encoder, self.accelerator = args, encoder, accelerator
        self._held_out, self._held_out_pairs, self._cache = None, None, None
        folder = cache_folder(args)
        if folder and not args.unfreeze:
            numerics = f"{device_name(accelerator.device)} {accelerator.mixed_precision}"
            key = encoder_fingerprint(encoder, numerics)
            self._cache = FeatureCache(folder / "features", key, encoder.hidden_size)

    def prepare(self, training) -> None:
        """Tokenises the training turns and, where the encoder is frozen, encodes them."""
        texts = [training.texts]
        if self.args.curriculum or self.args.curriculum_exposure:
            texts.append(training.told_texts())
        self._pairs = [self.encoder.tokenize(part) for part in texts]
        if not self.args.unfreeze:
            self._features = [self._encode(pairs, "training") for pairs in self._pairs]

    def training(self, turns, told, parts: int):
        """(k, hidden) of the training turns `turns` (k,), those with `told` (k,) with the user's answer shown; one of
        `parts` calls whose gradients are kept at the same time."""
        import torch

        if self.args.unfreeze:
            pairs = [self._pairs[known][i] for i, known in zip(turns, told.astype(int), strict=True)]
            return self.encoder.encode_with_gradients(pairs, self.accelerator.autocast, parts).cpu()
        plain = self._features[0][turns]
        if not told.any():
            return plain
        return torch.where(torch.from_numpy(told)[:, None], self._features[1][turns], plain)

    def held_out(self, validation):
        """(N, hidden) of the validation turns."""
        if self._held_out is None or self.args.unfreeze:
            self._held_out_pairs = self._held_out_pairs or self.encoder.tokenize(validation.texts)
            self._held_out = self._encode(self._held_out_pairs, "validation")
        return self._held_out

    def _encode(self, pairs, name: str):
        from evaluation import encode_together

        encode = partial(self.encoder.encode, autocast=self.accelerator.autocast, progress=f"encoding {name}")
        if self._cache:
            encode = partial(self._cache.encode, encode=encode)
        return encode_together(self.encoder, pairs, self.accelerator, encode)


def conversations_seen(path: Path | None, saved) -> frozenset[str]:
    """The conversations that the head at `path`, or the encoder under it, was trained on, as far as it is recorded."""
    from models import encoder_of_head
    from untrusted import read_json

    if path is None:
        return frozenset()
    records = [path.with_name(path.name + ".json")]
    if saved.config.encoder_is_folder:
        encoder = Path(encoder_of_head(saved, path))
        records.append(encoder.with_name(f"reward1_{encoder.name.removeprefix('lang_model_')}.json"))
    seen: set[str] = set()
    for record in records:
        if not record.is_file():
            continue  # such as of the published ones
        found = read_json(record, str(record))
        metrics, trained_on = found.get("metrics", {}), found.get("training_conversations", [])
        if not isinstance(metrics, dict) or not isinstance(trained_on, list):
            raise UserError(f"{record}: expected the record of a run, with its metrics and training_conversations")
        if "steps" in metrics:  # it trained
            seen.update(map(str, trained_on))
    return frozenset(seen)


def warn_of_leaks(seen: frozenset[str], validation) -> None:
    """Says so when an earlier stage trained on conversations that are validated on here (the data changed since)."""
    both = seen & {t.conversation.id for t in validation.trajectories}
    if both:
        print(
            f"Warning: {len(both)} of this run's validation conversations were trained on before: the data has changed "
            "since. Validation results will look better than they are; train stage 1 again."
        )


def train(args, head, turns: Encoded, training, validation, tracker, head_path: Path, encoder_path: Path) -> dict:
    """Trains the head (and, with `--unfreeze`, the encoder) with linear decay to 0, a few conversations a step; keeps
    the best by GE loss.

    Returns:
        {"steps": int, "best_epoch": int, "best_ge_loss": float or None}.
    """
    import numpy as np
    import torch

    from cache import encoder_fingerprint
    from data_utils import fingerprint, told_share
    from evaluation import evaluate, head_rewards, wandb_validation
    from models import save_reward_head
    from runs import progress_bar, sum_gradients
    from states import RunState, Trained

    conversations: dict[str, list[int]] = {}
    for i, trajectory in enumerate(training.trajectories):
        conversations.setdefault(trajectory.conversation.id, []).append(i)
    groups = list(conversations.values())
    rng = np.random.default_rng(args.seed)
    epoch_steps = -(-len(groups) // args.batch_size)
    steps = args.epochs * epoch_steps
    scales = loss_scales(args, training)
    turns.prepare(training)
    parameters = [{"params": list(head.parameters()), "lr": args.learning_rate}]
    if args.unfreeze:
        parameters.append({"params": turns.encoder.trainable(), "lr": args.encoder_learning_rate})
    # foreach cannot mix weights that are spread with whole ones
    optimizer = torch.optim.AdamW(parameters, foreach=False if turns.encoder.agree else None)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    best = {"steps": steps, "best_epoch": 0, "best_ge_loss": None}
    order: dict[str, list[int]] = {}  # of the conversations in this epoch
    parts = {"head": head, "optimizer": optimizer, "schedule": schedule, "best": best, "order": order}
    if args.unfreeze:
        parts["encoder"] = Trained(turns.encoder.encoder)
    inputs = {"data": fingerprint(training.trajectories + validation.trajectories)}
    if not args.unfreeze:  # else it is in the state
        inputs["encoder"] = encoder_fingerprint(turns.encoder, "")
    state = RunState(tracker, turns.accelerator, parts, {"training": rng}, inputs, args.save_steps, steps)
    first = state.restore()
    head.train()
    turns.encoder.train(args.unfreeze)
    bar = progress_bar(range(first, steps), desc="stage 2", unit="step", initial=first, total=steps)
    with state.watch():
        for before in bar:
            step, (epoch, place) = before + 1, divmod(before, epoch_steps)
            epoch += 1
            if place == 0:
                order["groups"] = rng.permutation(len(groups)).tolist()
            taken = order["groups"][place * args.batch_size : (place + 1) * args.batch_size]
            chosen = [i for group in taken for i in groups[group]]
            told = told_share(args.curriculum, args.curriculum_exposure, epoch, args.epochs)
            contrastive = args.contrastive and epoch % 2 == 0
            loss, logged = batch_loss(args, head, turns, training, chosen, scales, rng, told, contrastive)
            if loss.requires_grad:
                loss.backward()
            norm = sum_gradients([p for group in optimizer.param_groups for p in group["params"]], turns.accelerator)
            logged["train/gradient_norm"] = norm
            if not np.isfinite(logged["train/loss"] + logged["train/shaped_loss"] + norm):
                state.not_finite("the loss or its gradient", step, [training.trajectories[i].key for i in chosen])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            better = place == epoch_steps - 1  # the epoch's end
            if better:
                if args.val:
                    rewards = head_rewards(head, turns.held_out(validation), validation)
                    metrics = evaluate(validation, rewards, args.ep_len, args.redist_type)
                    logged |= wandb_validation(metrics)
                    better = best["best_ge_loss"] is None or metrics["ge_loss"] < best["best_ge_loss"]
                if better:
                    best |= {"best_epoch": epoch, "best_ge_loss": metrics["ge_loss"] if args.val else None}
                    if args.unfreeze:
                        turns.encoder.save(encoder_path)
                    save_reward_head(head, head_path)
            tracker.log(logged, step)
            state.done(step, save=better)
    return best


def loss_scales(args, training) -> tuple[float, float]:
    """What GE's and LI's losses are divided by: with `--loss_scale normalized` the variances of their targets."""
    import numpy as np

    from evaluation import length_of
    from models import DECOMPOSITIONS

    if args.loss_scale == "raw":
        return 1.0, 1.0
    lengths = np.array([length_of(args.ep_len, n) for n in np.diff(training.offsets)])
    targets = DECOMPOSITIONS[args.redist_type].target(training.scores, lengths)
    return tuple(float(target.var()) or 1.0 for target in (targets, training.targets))


def batch_loss(args, head, turns: Encoded, training, chosen: list[int], scales, rng, told_share, contrastive: bool):
    """This process' part of the loss () of the trajectories `chosen`, and what is logged of the whole.

    Args:
        scales: of the two losses. told_share: share of turns that show the user's answer. contrastive: add that loss.
    """
    import numpy as np
    import torch

    from evaluation import affect_means, length_of
    from models import DECOMPOSITIONS, contrastive_term, draw_turns, geli_loss, li_loss
    from runs import gather_shares, share

    decomposition = DECOMPOSITIONS[args.redist_type]
    weight = args.ge_weight if head.config.li else 1.0
    drawn = []  # for all of them in every process, so that all draw the same
    for i in chosen:
        place = training.turns_of(i)
        n_turns = place.stop - place.start
        part = draw_turns(n_turns, args.K, rng) if decomposition.uses_subset else np.arange(n_turns)
        told = rng.random(len(part)) < told_share if told_share else np.zeros(len(part), dtype=bool)
        drawn.append((i, part + place.start, told, length_of(args.ep_len, n_turns)))
    losses, hidden_seen, seen = [torch.zeros(())], [], []
    mine = share(drawn, turns.accelerator)
    for i, part, told, length in mine:
        rewards, hidden = head(turns.training(part, told, len(mine)), with_hidden=True)
        rewards, score = rewards.squeeze(1), training.scores[i]
        li = li_loss(rewards, torch.from_numpy(training.targets[part]))
        losses.append(geli_loss(decomposition.loss(rewards, score, length), li, weight, *scales))
        ge = (score - decomposition.predicted_return(rewards.detach(), length).item()) ** 2
        hidden_seen.append(hidden)
        seen.append((part, ge, li.item(), rewards.detach().numpy()))
    for _ in range(len(mine), -(-len(drawn) // turns.accelerator.num_processes)):  # where another process has one more
        losses.append(turns.training(drawn[0][1][:0], drawn[0][2][:0], 1).sum())
    loss, term = torch.stack(losses).sum() / len(chosen), torch.zeros(())
    if contrastive and seen:
        labels = training.labels[np.concatenate([part for part, *_ in seen])]
        term = contrastive_term(torch.cat(hidden_seen), labels) * len(seen) / len(chosen)
        loss = loss + term
    parts, ge, li, rewards = zip(*gather_shares(seen, turns.accelerator), strict=True)
    logged = {"train/loss": float(np.mean(ge)), "train/shaped_loss": float(np.mean(li))}
    if contrastive:
        logged["train/contrastive_loss"] = term.item()
    logged |= affect_means(np.concatenate(rewards), training.affects[np.concatenate(parts)], "train_shape/train")
    return loss, logged


if __name__ == "__main__":
    run(main)
