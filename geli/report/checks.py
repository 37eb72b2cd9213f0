"""Checks of the data that a head is trained and measured on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_utils import LI_SIGNALS, NO_FACE, SignalOptions, Trajectory, TurnSet
from geli.data.candor import MIN_WORDS
from geli.heads import encoder_of_head
from geli.nets.pretrained import read_json
from geli.report.verdict import SATURATED
from geli.run.errors import UserError
from geli.run.files import read_json_or_empty
from models import RewardHead, RewardHeadConfig, length_of


def conversations_seen(head_path: Path, config: RewardHeadConfig) -> frozenset[str]:
    """The conversations that a saved head was trained on, or the encoder that it uses, or the heads that their training
    started from, as far as records exist.

    Raises:
        UserError: if a record is not readable.
    """
    heads = [head_path]
    if config.encoder_is_folder:
        encoder = Path(encoder_of_head(config, head_path))
        heads.append(encoder.with_name(f"reward1_{encoder.name.removeprefix('lang_model_')}"))
    seen: set[str] = set()
    records: set[Path] = set()  # those that were read
    while heads:
        head = heads.pop()
        record = head.with_name(head.name + ".json").resolve()
        if record in records or not record.is_file():
            continue  # published heads have none
        records.add(record)
        content = read_json(record, str(record))
        metrics, trained_on = content.get("metrics", {}), content.get("training_conversations", [])
        started_from = content.get("started_from")
        if not (isinstance(metrics, dict) and isinstance(trained_on, list) and isinstance(started_from, str | None)):
            raise UserError(
                f"{record}: expected the record of a run, with its metrics, training_conversations and started_from"
            )
        if "steps" in metrics:  # otherwise the run only evaluated
            seen.update(map(str, trained_on))
        if started_from:
            heads.append(record.parent / started_from)
    return frozenset(seen)


def warn_of_leaks(seen: frozenset[str], validation: Sequence[Trajectory]) -> None:
    """Prints a warning if an earlier stage was trained on conversations that are now used for validation."""
    both = seen & {t.conversation.id for t in validation}
    if both:
        print(
            f"Warning: {len(both)} of this run's validation conversations were trained on before: the data has changed "
            "since. Validation results will look better than they are; train stage 1 again."
        )


def check_li_targets(training: TurnSet, signal: SignalOptions) -> None:
    """Prints how many turns have a reaction to learn from and how much the LI targets differ, and warns of few.

    Raises:
        UserError: if no turn (of faces: none of `MIN_WORDS` words) has a reaction: then nothing can be learned.
    """
    faces, what = LI_SIGNALS[signal.li_signal].needs_faces, f"--li_signal {signal.li_signal}"
    of_words = f" of {MIN_WORDS} words or more" if faces else ""
    known, targets = training.known, training.targets[~np.isnan(training.targets)]
    if faces:
        known = known[(training.affects != NO_FACE) & (training.n_words >= MIN_WORDS)]
    if (len(known) and not known.any()) or not len(targets):
        raise UserError(f"{what}: none of the {len(known):,} turns{of_words} has a reaction")
    values, counts = np.unique(targets, return_counts=True)
    print(
        f"LI targets: {known.mean() if len(known) else 0:.0%} of the {len(known):,} turns{of_words} have a reaction "
        f"({signal.li_signal}); {1 - counts.max() / len(targets):.1%} of {len(targets):,} targets differ from the "
        f"commonest, {values[counts.argmax()]:g}"
    )
    if len(values) == 1:
        print(
            f"Warning: all {len(targets):,} LI targets are {targets[0]:g}: {what} found no reaction that differs; "
            "another signal may, or train GE alone"
        )
    if faces and len(known) and known.mean() < 0.5:
        print(
            f"Warning: {what} has no reaction for most turns; do the times of transcript and faces agree (both in "
            "seconds from the beginning of the call)?"
        )


def warn_of_scores_out_of_reach(head: RewardHead, training: TurnSet, ep_len: int | str) -> None:
    """Prints a warning if rewards that end at 1 cannot add up to some of the scores."""
    if not head.bounded:
        return
    needed = np.abs(training.scores / [length_of(ep_len, n) for n in np.diff(training.offsets)])
    if share := np.mean(needed > SATURATED):
        print(
            f"Warning: --ep_len {ep_len}: {share:.0%} of the scores need rewards (score / L) that --{head.config.head} "
            f"cannot give: {np.median(needed):.1f} in the middle, and its rewards end at 1, all alike there. Give an "
            f"--ep_len above {training.scores.max():.0f}, or another head"
        )


def is_of_corpus(head_path: Path, data_dir: str) -> bool:
    """Whether a head was trained on conversations of `data_dir`, or has no record that says on which."""
    record, folder = read_json_or_empty(head_path.with_name(head_path.name + ".json")), Path(data_dir)
    trained_on, arguments = record.get("training_conversations"), record.get("arguments")
    if isinstance(trained_on, list) and trained_on and any(folder.glob("*/")):
        return any((folder / str(name)).is_dir() for name in trained_on)
    if isinstance(arguments, dict) and (folder.is_file() or any(folder.glob("*.jsonl*"))):  # chats
        return Path(str(arguments.get("data_dir"))).name == folder.name
    return True


def warn_of_other_corpus(head_path: Path, data_dir: str) -> None:
    """Says if a head was trained on another corpus."""
    if not is_of_corpus(head_path, data_dir):
        print(f"Warning: {head_path} was trained on another corpus than --data_dir {data_dir}")
