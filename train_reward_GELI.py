"""Stage 2 (GELI): turn rewards that add up to the score (GE) and follow the listener's face (LI).

    python train_reward_GELI.py --redist_type RRD --reward_class overall_affect --model convo --batch_size 1 --K 160 \\
        --train_size 100 --train --val --small_model_shrink --affect_path devout-brook-114

With `--affect_path RUN` the head and the encoder start from that stage-1 run and the loss is lambda GE + (1-lambda) LI;
without it the loss is GE alone. The encoder is frozen, so every turn is encoded once.
"""

import json
from pathlib import Path

from cli import (
    ENCODERS,
    UserError,
    add_common_options,
    add_reward_options,
    fraction,
    head_name,
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
    add("--lambda", type=fraction, default=0.5, dest="ge_weight", metavar="L", help="weight of GE; 1 - L is LI's")
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
    return args


def project_name(args) -> str:
    """wandb's project, which is also the folder's name."""
    kind = "visual_feedback_baselines" if args.affect_path else "baselines"
    return f"{kind}_{Path(args.model).name}_{args.reward_class}_baseline_{args.redist_type}_K_{args.K}"


def main() -> None:
    """Parse, build, train, evaluate, write."""
    args = parse()

    from evaluation import evaluate, load_data, write_results, write_validation
    from models import load_reward_head
    from runs import Tracker, format_table, make_accelerator, seed_everything

    seed_everything(args.seed)
    accelerator = make_accelerator(args.device, args.dtype)
    folder = Path(args.output_dir) / project_name(args)
    start, encoder, encoder_name = build(args, folder)
    corpus, training, validation = load_data(args)
    if args.affect_path:
        warn_of_leaks(find_head(args.affect_path, args.output_dir), validation)
    counts = {name: value for name, value in corpus.counts().items() if isinstance(value, int)}
    tracker = Tracker(folder.name, folder, {**vars(args), "data": counts}, args.run_name)

    encoder.to(accelerator.device)
    features = {
        name: encoder.encode(encoder.tokenize(part.texts), accelerator.autocast, progress=f"encoding {name}")
        for name, part in (("training", training), ("validation", validation))
        if (name == "training" and args.train) or (name == "validation" and args.val)
    }
    metrics: dict = {}
    paths = []
    head, head_path = start, folder / f"reward1_{tracker.name}"
    if args.train:
        metrics |= train(args, start, training, validation, features, tracker, head_path)
        head = load_reward_head(head_path)
        paths.append(head_path)
    if args.val:
        rewards = predict(head, features["validation"])
        metrics["validation"] = evaluate(validation, rewards, args.ep_len)
        mean_score = training.scores.mean()
        metrics["validation"]["ge_loss_of_training_mean"] = float(((validation.scores - mean_score) ** 2).mean())
        paths += write_validation(folder, tracker.name, validation, rewards, args.ep_len)
        tracker.summary({f"final/{key}": value for key, value in metrics["validation"].items()})
    parts = {"training_conversations": training, "validation_conversations": validation}
    write_results(folder, tracker.name, args, corpus, parts, metrics, stage=2, encoder=encoder_name)
    tracker.finish()
    rows = [{"measured on validation": key, "value": value} for key, value in metrics.get("validation", {}).items()]
    what = f"{'GELI' if head.config.li else 'GE'}, {head.config.redist_type}"
    print(format_table(rows or [{"measured": "nothing (no --val)"}], f"\nStage 2 ({what}), run {tracker.name}"))
    print("\n".join(["Written:", *(f"  {path}" for path in [*paths, folder / f"reward1_{tracker.name}.json"])]))


def find_head(name: str, output_dir: str) -> Path:
    """The head file that a run name or a path means.

    Raises:
        UserError: if there is none, or the run name is in more than one folder.
    """
    path = Path(name)
    if path.is_file():
        return path
    found = sorted(Path(output_dir).glob(f"*/reward1_{path.name}")) if path.name == name else []
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{name}: {len(found)} runs have that name; give one's path: {', '.join(map(str, found))}")
    known = sorted(p.name.removeprefix("reward1_") for p in Path(output_dir).glob("*/reward1_*") if not p.suffix)
    raise UserError(
        f"{name}: expected a run name or the path of a reward1_ file, found neither under {output_dir}; "
        f"runs there: {', '.join(known) or 'none'}"
    )


def build(args, folder: Path):
    """The head to start from (or to evaluate), the frozen encoder, and the encoder's hub id or folder."""
    from dataclasses import replace

    from models import RewardHead, RewardHeadConfig, encoder_of_head, encoder_reference, load_encoder, load_reward_head

    start = None
    if args.affect_path or not args.train:
        if not args.train and not args.reward_path:
            raise UserError("--val without --train evaluates a saved head: name it with --reward_path RUN")
        path = find_head(args.affect_path if args.train else args.reward_path, args.output_dir)
        start = load_reward_head(path)
    if start is not None and not args.lang_model_path:
        name, option = encoder_of_head(start, path), f"the encoder that {path} was trained on,"
    else:
        name = args.lang_model_path or ENCODERS.get(args.model, args.model)
        option = "--lang_model_path" if args.lang_model_path else "--model"
    encoder = load_encoder(name, args.max_length, option)
    if not args.train:
        return start, encoder, name
    config = RewardHeadConfig(
        head=head_name(args) if start is None else start.config.head,
        hidden=encoder.hidden_size,
        **encoder_reference(name, folder),
        max_length=encoder.max_length,
        context_turns=args.context_turns,
        stage=2,
        reward_class=args.reward_class,
        redist_type=args.redist_type,
        li=start is not None,
    )
    head = RewardHead(config)
    if start is not None:
        if config.head != head_name(args):
            raise UserError(
                f"--affect_path {args.affect_path}: its head is of the kind {config.head}, the options ask for "
                f"{head_name(args)}; give the options that it was trained with"
            )
        if start.config.hidden != config.hidden:
            raise UserError(
                f"--affect_path {args.affect_path}: its head takes {start.config.hidden} features, the encoder {name} "
                f"gives {config.hidden}"
            )
        head.load_state_dict(start.state_dict())
        head.config = replace(config)
    return head, encoder, name


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


def predict(head, features):
    """(N,) float32 rewards of encoded turns, in eval mode."""
    import torch

    was_training = head.training
    head.eval()
    with torch.inference_mode():
        rewards = head(features).squeeze(1).numpy()
    head.train(was_training)
    return rewards


def train(args, head, training, validation, features, tracker, head_path) -> dict:
    """Trains the head with linear decay to 0 on encoded turns, a few conversations a step; keeps the best by GE loss.

    Returns:
        {"steps": int, "best_epoch": int, "best_ge_loss": float or None}.
    """
    import numpy as np
    import torch

    from evaluation import affect_means, evaluate, length_of, wandb_validation
    from models import DECOMPOSITIONS, draw_turns, geli_loss, li_loss, rrd_loss, save_reward_head
    from runs import progress_bar

    decomposition = DECOMPOSITIONS[args.redist_type]
    scales = (1.0, 1.0)
    if args.loss_scale == "normalized":
        scales = tuple(float(max(x.var(), 1e-8)) for x in (training.scores, training.targets))
    weight = args.ge_weight if head.config.li else 1.0
    targets = torch.from_numpy(training.targets)
    conversations: dict[str, list[int]] = {}
    for i, trajectory in enumerate(training.trajectories):
        conversations.setdefault(trajectory.conversation.id, []).append(i)
    groups = list(conversations.values())
    rng = np.random.default_rng(args.seed)
    steps_per_epoch = -(-len(groups) // args.batch_size)
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.epochs * steps_per_epoch)
    best = {"steps": args.epochs * steps_per_epoch, "best_epoch": 0, "best_ge_loss": None}
    step = 0
    for epoch in range(1, args.epochs + 1):
        head.train()
        order = rng.permutation(len(groups))
        starts = range(0, len(order), args.batch_size)
        for first in progress_bar(starts, desc=f"stage 2, epoch {epoch}/{args.epochs}", unit="step"):
            chosen = [i for g in order[first : first + args.batch_size] for i in groups[g]]
            losses, logged_ge, logged_li, seen = [], [], [], []
            for i in chosen:
                turns, score = training.turns_of(i), training.scores[i]
                n_turns = turns.stop - turns.start
                length = length_of(args.ep_len, n_turns)
                part = np.arange(n_turns)
                if decomposition.uses_subset:
                    part = draw_turns(n_turns, args.K, rng)
                part = part + turns.start
                rewards = head(features["training"][part]).squeeze(1)
                li = li_loss(rewards, targets[part])
                losses.append(geli_loss(decomposition.loss(rewards, score, length), li, weight, *scales))
                logged_ge.append(rrd_loss(rewards.detach(), score, length).item())
                logged_li.append(li.item())
                seen.append((rewards.detach().numpy(), training.affects[part]))
            loss = torch.stack(losses).mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            logged = {"train/loss": np.mean(logged_ge), "train/shaped_loss": np.mean(logged_li)}
            logged |= affect_means(*map(np.concatenate, zip(*seen, strict=True)), "train_shape/train")
            if step % steps_per_epoch or not args.val:
                tracker.log(logged, step)
        if args.val:
            metrics = evaluate(validation, predict(head, features["validation"]), args.ep_len)
            tracker.log({**logged, **wandb_validation(metrics)}, step)
            if best["best_ge_loss"] is not None and metrics["ge_loss"] >= best["best_ge_loss"]:
                continue
            best["best_ge_loss"] = metrics["ge_loss"]
        best["best_epoch"] = epoch
        save_reward_head(head, head_path)
    return best


if __name__ == "__main__":
    run(main)
