"""Stage 2 (GELI): turn rewards that add up to the score (GE) and follow the listener's face (LI).

    python train_reward_GELI.py --redist_type RRD --reward_class overall_affect --model convo --batch_size 1 --K 160 \\
        --train_size 100 --train --val --small_model_shrink --affect_path devout-brook-114

With `--affect_path RUN` the head and the encoder start from that stage-1 run and the loss is lambda GE + (1-lambda) LI;
without it the loss is GE alone. The encoder is frozen, so every turn is encoded once.
"""

import json
from pathlib import Path

from cli import (
    UserError,
    add_common_options,
    add_reward_options,
    fraction,
    head_name,
    named_encoder,
    new_parser,
    positive_int,
    run,
)

REDIST_TYPES = ("RRD",)


def parse():
    """The command line."""
    parser = new_parser("Stage 2: learn turn rewards from the score (GE), with stage 1's affect (GELI) or without.")
    add = parser.add_argument
    add("--redist_type", choices=REDIST_TYPES, default="RRD", help="how the score is decomposed")
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
    add("--K", type=positive_int, default=160, help="turns of a trajectory in a step (all when there are fewer)")
    add_common_options(parser, learning_rate=5e-3, context_turns=20)
    args = parser.parse_args()
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
    args.ge_weight = 0.5 if args.ge_weight is None else args.ge_weight
    return args


def project_name(args) -> str:
    """wandb's project, which is also the folder's name."""
    kind = "visual_feedback_baselines" if args.affect_path else "baselines"
    return f"{kind}_{Path(args.model).name}_{args.reward_class}_baseline_{args.redist_type}_K_{args.K}"


def main() -> None:
    """Parse, build, train, evaluate, write."""
    args = parse()

    from evaluation import evaluate, finish_run, head_rewards, load_data, write_validation
    from models import load_reward_head
    from runs import Tracker, make_accelerator, seed_everything

    seed_everything(args.seed)
    accelerator = make_accelerator(args.device, args.dtype)
    folder = Path(args.output_dir) / project_name(args)
    saved, path = load_saved(args)
    if saved and not args.train:  # a saved head is evaluated as it was trained
        args.context_turns, args.max_length = saved.config.context_turns, saved.config.max_length
        folder = Path(args.output_dir) / path.resolve().parent.name
    corpus, training, validation = load_data(args)
    if args.affect_path:
        warn_of_leaks(path, validation)
    head, encoder, encoder_name = build(args, folder, saved, path)
    tracker = Tracker(folder.name, folder, {**vars(args), "data": corpus.numbers()}, args.run_name)

    encoder.to(accelerator.device)

    def encode(turns, name):
        return encoder.encode(encoder.tokenize(turns.texts), accelerator.autocast, progress=f"encoding {name}")

    held_out = encode(validation, "validation") if args.val else None
    metrics, paths, rewards = {}, [], None
    if args.train:
        head_path = folder / f"reward1_{tracker.name}"
        features = encode(training, "training")
        metrics |= train(args, head, training, features, validation, held_out, tracker, head_path)
        head = load_reward_head(head_path)  # the best, as it was written
        paths.append(head_path)
    if args.val:
        rewards = head_rewards(head, held_out)
        metrics["validation"] = evaluate(validation, rewards, args.ep_len)
        mean_score = training.scores.mean()
        metrics["validation"]["ge_loss_of_training_mean"] = float(((validation.scores - mean_score) ** 2).mean())
        paths += write_validation(folder, tracker.name, validation, rewards, args.ep_len)
    title = f"Stage 2 ({'GELI' if head.config.li else 'GE'}, {head.config.redist_type})"
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
    return saved, path


def build(args, folder: Path, saved, path: Path | None):
    """The head to train or to evaluate, the encoder, and the encoder's hub id or folder."""
    from models import RewardHead, RewardHeadConfig, encoder_reference, load_encoder, load_encoder_of_head

    if saved:
        encoder = load_encoder_of_head(saved, path, args.max_length, args.lang_model_path)
    else:
        name, option = named_encoder(args)
        encoder = load_encoder(name, args.max_length, option)
    if not args.train:
        return saved, encoder, encoder.name
    config = RewardHeadConfig(
        head=head_name(args),
        hidden=encoder.hidden_size,
        **encoder_reference(encoder.name, folder),
        max_length=encoder.max_length,
        context_turns=args.context_turns,
        stage=2,
        reward_class=args.reward_class,
        redist_type=args.redist_type,
        li=saved is not None,
    )
    head = RewardHead(config)
    if saved:
        if saved.config.head != config.head:
            raise UserError(
                f"--affect_path {args.affect_path}: its head is of the kind {saved.config.head}, the options ask for "
                f"{config.head}; give the options that it was trained with"
            )
        head.load_state_dict(saved.state_dict())
    return head, encoder, encoder.name


def warn_of_leaks(affect_head: Path, validation) -> None:
    """Says so when stage 1 trained on conversations that are validated on here (the data changed in between)."""
    try:
        seen = set(json.loads(affect_head.with_name(affect_head.name + ".json").read_text())["training_conversations"])
    except (OSError, ValueError, KeyError):
        return  # a head without a record, such as the published one
    both = seen & {t.conversation.id for t in validation.trajectories}
    if both:
        print(
            f"Warning: {affect_head.name} was trained on {len(both)} of this run's validation conversations: the data "
            "has changed since. Its validation results will look better than they are; train stage 1 again."
        )


def train(args, head, training, features, validation, held_out, tracker, head_path) -> dict:
    """Trains the head with linear decay to 0 on encoded turns, a few conversations a step; keeps the best by GE loss.

    Args:
        head: what is trained. training, validation: `TurnSet`s. features, held_out: their (N, hidden) features.

    Returns:
        {"steps": int, "best_epoch": int, "best_ge_loss": float or None}.
    """
    import numpy as np
    import torch

    from evaluation import evaluate, head_rewards, wandb_validation
    from models import save_reward_head
    from runs import progress_bar

    conversations: dict[str, list[int]] = {}
    for i, trajectory in enumerate(training.trajectories):
        conversations.setdefault(trajectory.conversation.id, []).append(i)
    groups = list(conversations.values())
    rng = np.random.default_rng(args.seed)
    starts = range(0, len(groups), args.batch_size)
    scales = (1.0, 1.0)
    if args.loss_scale == "normalized":
        scales = tuple(float(target.var()) or 1.0 for target in (training.scores, training.targets))
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.epochs * len(starts))
    best = {"steps": args.epochs * len(starts), "best_epoch": 0, "best_ge_loss": None}
    step = 0
    for epoch in range(1, args.epochs + 1):
        head.train()
        order = rng.permutation(len(groups))
        for start in progress_bar(starts, desc=f"stage 2, epoch {epoch}/{args.epochs}", unit="step"):
            chosen = [i for group in order[start : start + args.batch_size] for i in groups[group]]
            loss, logged = batch_loss(args, head, training, features, chosen, scales, rng)
            if not torch.isfinite(loss):
                raise UserError(f"the loss is not finite at step {step + 1}: try a lower --learning_rate")
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if start == starts[-1] and args.val:
                metrics = evaluate(validation, head_rewards(head, held_out), args.ep_len)
                logged |= wandb_validation(metrics)
            tracker.log(logged, step)
        if args.val:
            if best["best_ge_loss"] is not None and metrics["ge_loss"] >= best["best_ge_loss"]:
                continue
            best["best_ge_loss"] = metrics["ge_loss"]
        best["best_epoch"] = epoch
        save_reward_head(head, head_path)
    return best


def batch_loss(args, head, training, features, chosen: list[int], scales: tuple[float, float], rng):
    """The loss () of the trajectories `chosen`, and what is logged of it."""
    import numpy as np
    import torch

    from evaluation import affect_means, length_of
    from models import DECOMPOSITIONS, draw_turns, geli_loss, li_loss, rrd_loss

    decomposition = DECOMPOSITIONS[args.redist_type]
    weight = args.ge_weight if head.config.li else 1.0
    losses, ge, li, rewards_seen, affects_seen = [], [], [], [], []
    for i in chosen:
        turns, score = training.turns_of(i), training.scores[i]
        n_turns = turns.stop - turns.start
        length = length_of(args.ep_len, n_turns)
        part = draw_turns(n_turns, args.K, rng) if decomposition.uses_subset else np.arange(n_turns)
        part = part + turns.start
        rewards = head(features[part]).squeeze(1)
        li.append(li_loss(rewards, torch.from_numpy(training.targets[part])))
        losses.append(geli_loss(decomposition.loss(rewards, score, length), li[-1], weight, *scales))
        ge.append(rrd_loss(rewards.detach(), score, length).item())
        rewards_seen.append(rewards.detach().numpy())
        affects_seen.append(training.affects[part])
    logged = {"train/loss": np.mean(ge), "train/shaped_loss": torch.stack(li).mean().item()}
    logged |= affect_means(np.concatenate(rewards_seen), np.concatenate(affects_seen), "train_shape/train")
    return torch.stack(losses).mean(), logged


if __name__ == "__main__":
    run(main)
