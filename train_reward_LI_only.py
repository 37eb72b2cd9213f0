"""Stage 1 (LI): a reward for every turn from the listener's face alone, by distilling the face into the text.

    python train_reward_LI_only.py --reward_class overall_affect --model convo --batch_size 32 --K 32 \\
        --train_size 500 --val --small_model_shrink

Trains the encoder and a reward head on every agent turn of both trajectories, and writes `reward1_{run}` and
`lang_model_{run}/`, which stages 2 and 3 start from.
"""

from pathlib import Path

from cli import (
    ADAPTED,
    add_common_options,
    add_reward_options,
    check_reward_options,
    head_name,
    named_encoder,
    new_parser,
    positive_int,
    run,
)

VALIDATE_EVERY = 500  # steps


def build_parser():
    """The options."""
    parser = new_parser("Stage 1: learn turn rewards from the listener's face (LI), encoder and head.")
    add_reward_options(parser, epochs=8)
    parser.add_argument("--batch_size", type=positive_int, default=32, help="turns a step")
    parser.add_argument("--K", type=positive_int, default=32, help="turns of each trajectory validated on in training")
    parser.add_argument(
        "--unfreeze", action="store_true", help="name the folder as published for it (the encoder always trains here)"
    )
    add_common_options(parser, learning_rate=5e-6, context_turns=20, save_steps=500)
    return parser


def parse():
    """The command line."""
    parser = build_parser()
    args = parser.parse_args()
    args.li_signal = args.li_signal or "face"
    check_reward_options(parser, args)
    return args


def project_name(args) -> str:
    """wandb's project, which is also the folder's name."""
    model = Path(args.model).name
    if args.unfreeze:
        return f"reward_function_{model}_160_scaled_{args.reward_class}"
    return (
        f"SINGLE_INDEX_reward_function_{model}_{args.reward_class}_contra_{args.contrastive}_shrink_{args.hard_shrink}"
        f"_curriculum_{args.curriculum}_curriculum_exposure{args.curriculum_exposure}"
    )


def main() -> None:
    """Parse, build, train, evaluate, write."""
    args = parse()

    from evaluation import (
        encode_together,
        evaluate,
        finish_run,
        head_rewards,
        load_data,
        place_encoder,
        write_validation,
    )
    from models import RewardHead, RewardHeadConfig, load_encoder, load_reward_head
    from runs import Tracker, frozen_dtype, make_accelerator, seed_everything
    from states import reward_run_to_resume

    seed_everything(args.seed)
    accelerator = make_accelerator(args.device, args.dtype)
    folder = Path(args.output_dir) / project_name(args)
    claim = reward_run_to_resume(args, folder)
    corpus, training, validation = load_data(args)
    name, option = named_encoder(args)
    how = {"dtype": frozen_dtype(accelerator), "trust_remote_code": args.trust_remote_code}
    encoder = load_encoder(name, args.max_length, option, adapt=args.model in ADAPTED, **how)
    place_encoder(encoder, args, accelerator, trains=True)
    described = {**vars(args), "data": corpus.numbers()}
    tracker = Tracker(folder.name, folder, described, args.run_name, accelerator, claim)
    config = RewardHeadConfig(
        head=head_name(args),
        hidden=encoder.hidden_size,
        encoder=f"lang_model_{tracker.name}",
        encoder_is_folder=True,
        max_length=encoder.max_length,
        context_turns=args.context_turns,
        stage=1,
        reward_class=args.reward_class,
        li_signal=args.li_signal,
        sentiment_model=args.sentiment_model,
    )
    head_path, encoder_path = folder / f"reward1_{tracker.name}", folder / f"lang_model_{tracker.name}"

    head = RewardHead(config)
    head.start_at(min(max(float(training.targets.mean()), -0.95), 0.95))
    metrics = train(args, accelerator, encoder, head, training, validation, tracker, head_path, encoder_path)
    paths, rewards = [head_path, encoder_path], None
    accelerator.wait_for_everyone()
    if args.val:  # of what was written, not of what is in memory
        encoder = load_encoder(str(encoder_path), args.max_length, **how)
        place_encoder(encoder, args, accelerator)
        features = encode_together(encoder, encoder.tokenize(validation.texts), accelerator, progress="validation")
        rewards = head_rewards(load_reward_head(head_path), features)
        metrics["validation"] = evaluate(validation, rewards, args.ep_len)
        paths += write_validation(folder, tracker.name, validation, rewards, args.ep_len, None)
    parts = (training, validation)
    finish_run("Stage 1 (LI)", args, tracker, folder, corpus, parts, metrics, rewards, paths, stage=1, encoder=name)


def train(args, accelerator, encoder, head, training, validation, tracker, head_path, encoder_path) -> dict:
    """Trains encoder and head on the LI loss with linear decay to 0, and keeps the best on validation.

    Returns:
        {"best_step": int, "steps": int, "best_li_loss": float or None}.
    """
    import numpy as np
    import torch

    from data_utils import fingerprint, shuffled_batches, told_share
    from evaluation import (
        affect_means,
        choose_turns,
        encode_together,
        evaluate,
        head_rewards,
        length_of,
        wandb_validation,
    )
    from models import save_reward_head
    from runs import gather_shares, progress_bar, sum_gradients
    from states import RunState, Trained

    pairs = encoder.tokenize(training.texts)
    curriculum = args.curriculum or args.curriculum_exposure
    told_pairs = encoder.tokenize(training.told_texts()) if curriculum else pairs
    lengths = np.array([len(pair.ids) for pair in pairs])
    rng = np.random.default_rng(args.seed)
    epochs = range(1, args.epochs + 1)
    batches = [(epoch, batch) for epoch in epochs for batch in shuffled_batches(lengths, args.batch_size, rng)]
    n_turns = np.diff(training.offsets)
    score = np.repeat(training.scores, n_turns)  # each turn's R and L, for the GE loss that is logged
    length = np.repeat([length_of(args.ep_len, n) for n in n_turns], n_turns)
    if args.val:
        chosen = choose_turns(validation, args.K, args.seed)
        chosen_pairs = encoder.tokenize([validation.texts[i] for i in np.flatnonzero(chosen)])

    parameters = [*encoder.trainable(), *head.parameters()]
    # foreach cannot mix weights that are spread with whole ones
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, foreach=False if encoder.agree else None)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    head.to(accelerator.device)
    encoder.train()
    head.train()
    best = {"best_step": 0, "best_li_loss": None, "steps": len(batches)}
    parts = {
        "encoder": Trained(encoder.encoder),
        "head": head,
        "optimizer": optimizer,
        "schedule": schedule,
        "best": best,
    }
    inputs = {"data": fingerprint(training.trajectories + validation.trajectories)}
    state = RunState(tracker, accelerator, parts, {"training": rng}, inputs, args.save_steps, len(batches))
    first = state.restore()
    bar = progress_bar(batches[first:], desc="stage 1", unit="step", initial=first, total=len(batches))
    with state.watch():
        for step, (epoch, batch) in enumerate(bar, start=first + 1):
            told = np.zeros(len(batch), dtype=bool)
            if curriculum:
                told = rng.random(len(batch)) < told_share(
                    args.curriculum, args.curriculum_exposure, epoch, args.epochs
                )
            shown = [(told_pairs if knows else pairs)[i] for i, knows in zip(batch, told, strict=True)]
            contrastive = args.contrastive and epoch % 2 == 0
            loss, terms, rewards = batch_loss(encoder, head, training, batch, shown, contrastive, accelerator)
            if loss.requires_grad:
                loss.backward()
            norm = sum_gradients(parameters, accelerator)
            li_value, term_value = accelerator.reduce(terms.to(accelerator.device), "sum").tolist()
            if not np.isfinite(li_value + term_value + norm):
                state.not_finite("the loss or its gradient", step, training.ids(batch))
            logged = {"train/shaped_loss": li_value, "train/gradient_norm": norm}
            if contrastive:
                logged["train/contrastive_loss"] = term_value
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

            predicted = np.array(gather_shares(rewards.tolist(), accelerator), dtype=np.float32)
            ge = np.mean((score[batch] - length[batch] * predicted) ** 2)  # RRD's loss with |I| = 1
            logged |= {"train/loss": float(ge), "train/learning_rate": schedule.get_last_lr()[0]}
            logged |= affect_means(predicted, training.affects[batch], "train_shape/train")
            last = step == len(batches)
            if args.val and (step % VALIDATE_EVERY == 0 or last):
                held_out = np.zeros(len(validation), dtype=np.float32)
                held_out[chosen] = head_rewards(head, encode_together(encoder, chosen_pairs, accelerator))
                metrics = evaluate(validation, held_out, args.ep_len, chosen=chosen)
                logged |= wandb_validation(metrics)
                if best["best_li_loss"] is None or metrics["li_loss"] < best["best_li_loss"]:
                    best |= {"best_step": step, "best_li_loss": metrics["li_loss"]}
            better = best["best_step"] == step or (last and not args.val)
            if better:
                best["best_step"] = step
                encoder.save(encoder_path)
                save_reward_head(head, head_path)
            tracker.log(logged, step)
            state.done(step, save=better)
    return best


def batch_loss(encoder, head, training, batch, shown, contrastive: bool, accelerator):
    """This process' part of the loss of a batch.

    Args:
        batch: (n,) indices of the training turns in all processes' batch. shown: their n tokenised texts.
        contrastive: add that loss.

    Returns:
        loss (), which adds up to the batch's mean over all processes; its LI and contrastive parts (2,), detached; and
        the rewards (m,) of this process' share.
    """
    import numpy as np
    import torch

    from models import contrastive_term, li_loss
    from runs import share

    mine = share(np.arange(len(batch)), accelerator)
    features = encoder.encode_with_gradients([shown[i] for i in mine], accelerator.autocast)
    if not len(mine):
        return features.sum(), torch.zeros(2), torch.zeros(0)
    with accelerator.autocast():
        rewards, hidden = head(features, with_hidden=True)
    rewards, part = rewards.squeeze(1).float(), len(mine) / len(batch)
    li = li_loss(rewards, torch.from_numpy(training.targets[batch[mine]]).to(rewards.device)) * part
    term = contrastive_term(hidden, training.labels[batch[mine]]) * part if contrastive else torch.zeros_like(li)
    return li + term, torch.stack([li, term]).detach().cpu(), rewards.detach()


if __name__ == "__main__":
    run(main)
