"""Conversations as the training stages see them: trajectories, LI signals and targets, splits, texts and prompts.

A conversation gives two *trajectories*. In each, one person is the user, who rates the conversation, and the other is
the agent, whose turns are the actions. So every turn is an agent turn in exactly one of the two trajectories.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from geli.data.candor import HAPPINESS, NEGATIVE, TRANSCRIPTS, Conversation, Dropped, Turn
from geli.data.chats import Range
from geli.data.corpus import by_count, common_reasons, printable, read_conversations
from geli.data.hindsight import hindsight
from geli.data.questions import QUESTIONS
from geli.data.shares import TrajectoryShares
from geli.data.words import surface
from geli.nets.prompts import Prompt, context_text, prompt_text
from geli.run.errors import UserError, one_line
from geli.run.options import option, positive_int

# ---------------------------------------------------------------------------------------------------------------------
# Trajectories


@dataclass(frozen=True)
class Trajectory:
    """One side of a conversation.

    Attributes:
        conversation: where it comes from.
        flip: False if the first speaker of the transcript is the user (who rates), True if the other one is.
        user, agent: user ids.
        score: R, the user's rating in points, about 0 to 100.
        answer: the rating as it stands in the survey.
        agent_turns: indices into `conversation.turns`, ascending, at least one.
    """

    conversation: Conversation
    flip: bool
    user: str
    agent: str
    score: float
    answer: float
    agent_turns: tuple[int, ...]

    @property
    def key(self) -> str:
        """A name for the trajectory, the same on every machine."""
        return f"{self.conversation.id}/{int(self.flip)}"

    def turn_name(self, place: int) -> str:
        """A name for its agent turn number `place`."""
        return f"{self.key}/{self.conversation.turns[self.agent_turns[place]].turn_id}"


def make_trajectory(conversation: Conversation, flip: bool, reward_class: str) -> Trajectory:
    """The trajectory whose user is the transcript's first speaker (flip: the other one). Raises `Dropped` if the user
    did not answer `reward_class`."""
    user, agent = conversation.speakers[::-1] if flip else conversation.speakers
    answers = conversation.answers.get(user)
    if answers is None:
        raise Dropped("the user has no survey row")
    if reward_class not in answers:
        raise Dropped(f"no usable answer to {reward_class}")
    answer = answers[reward_class]
    turns = tuple(i for i, turn in enumerate(conversation.turns) if turn.speaker == agent)
    return Trajectory(conversation, flip, user, agent, QUESTIONS[reward_class].points * answer, answer, turns)


def fingerprint(trajectories: Iterable[Trajectory]) -> str:
    """A hash of all that was read of these trajectories."""
    content, seen = hashlib.blake2b(digest_size=16), set()
    for t in trajectories:
        content.update(repr((t.conversation.id, t.flip, t.score)).encode("utf-8", "surrogateescape"))
        if t.conversation.id not in seen:
            seen.add(t.conversation.id)
            content.update(repr(t.conversation.turns).encode("utf-8", "surrogateescape"))
    return content.hexdigest()


def _agent_turns(trajectories: Iterable[Trajectory]) -> list[Turn]:
    return [t.conversation.turns[i] for t in trajectories for i in t.agent_turns]


# ---------------------------------------------------------------------------------------------------------------------
# LI signals: what the user's reaction says about an agent turn


class Reactions(NamedTuple):
    """How the user reacted to each of n agent turns; what an LI signal returns.

    Attributes:
        polarity: (n,) 1 pleased, -1 displeased, 0 neither. strength: (n,) how pleased, in [0, 1].
        labels: (n,) integer class of the reaction, for the contrastive loss.
        known: (n,) bool, whether there was a reaction; None: to all. The others of an unknown one are those of none.
    """

    polarity: np.ndarray
    strength: np.ndarray
    labels: np.ndarray
    known: np.ndarray | None = None


def reactions_of_faces(affects: np.ndarray, happy_shares: np.ndarray) -> Reactions:
    """Reactions from the listener's affects (n,), as indices into `FACES`, and shares (n,) of happy frames."""
    affects = np.asarray(affects)
    polarity = (affects == HAPPINESS).astype(int) - np.isin(affects, NEGATIVE)
    return Reactions(polarity, np.asarray(happy_shares, dtype=np.float64), affects)


NEUTRAL_SENTIMENT = 0.05  # sentiment closer to 0 than this is neither positive nor negative


def reactions_of_sentiments(sentiments: np.ndarray) -> Reactions:
    """Reactions from the sentiments (n,), in [-1, 1], of the user's next turns."""
    polarity = (sentiments > NEUTRAL_SENTIMENT).astype(int) - (sentiments < -NEUTRAL_SENTIMENT)
    return Reactions(polarity, np.maximum(sentiments, 0.0), polarity + 1)


def face_reactions(trajectories: list[Trajectory], *_) -> Reactions:
    """The LI signal of the paper: the listener's face during each agent turn."""
    turns = _agent_turns(trajectories)
    affects = np.array([turn.affect for turn in turns], dtype=int)
    unseen = [set(t.conversation.unseen) for t in trajectories]
    seen = [i not in found for t, found in zip(trajectories, unseen, strict=True) for i in t.agent_turns]
    reactions = reactions_of_faces(affects, np.array([turn.happy_share for turn in turns], dtype=np.float64))
    return reactions._replace(known=np.array(seen, dtype=bool))


def thumb_reactions(trajectories: list[Trajectory], *_) -> Reactions:
    """The thumb or emoji that the user put under each agent turn of a chat."""
    found = [turn.reaction for turn in _agent_turns(trajectories)]
    polarity = np.array([reaction or 0 for reaction in found], dtype=int)
    known = np.array([reaction is not None for reaction in found], dtype=bool)
    return Reactions(polarity, np.maximum(polarity, 0.0), polarity + 1, known)


def hindsight_reactions(trajectories: list[Trajectory], _, __, training: list[Trajectory]) -> Reactions:
    """What the user's next turn says about the score: pleased if it says more than the median training turn."""

    def heard(t: Trajectory) -> tuple[str, float, list[str]]:
        return t.conversation.id, t.score, [next_user_utterance(t.conversation, i, t.user) for i in t.agent_turns]

    _, ranks = hindsight(list(map(heard, trajectories)), list(map(heard, training)))
    known, scores = ~np.isnan(ranks), np.array([t.score for t in trajectories for _ in t.agent_turns])
    if len(set(scores[known])) > 1 < len(set(ranks[known])):
        found = np.corrcoef(ranks[known], scores[known])[0, 1]
        print(f"hindsight: next turns and scores that their models have not seen: r = {found:.2f}")
    strength = np.where(known, ranks, 0.5)
    polarity = np.sign(strength - 0.5).astype(int)
    return Reactions(polarity, strength, polarity + 1, known)


def sentiment_reactions(
    trajectories: list[Trajectory], options: "SignalOptions", trust_remote_code: bool = False, *_
) -> Reactions:
    """The paper's language-sentiment baseline: the sentiment of what the user says next."""
    # imported here because it imports transformers, and this module is imported before options are parsed
    from geli.nets.sentiment import classifier_sentiment, lexicon_sentiment

    texts = [next_user_utterance(t.conversation, i, t.user) for t in trajectories for i in t.agent_turns]
    if options.sentiment_model:
        sentiments = classifier_sentiment(options.sentiment_model, texts, trust_remote_code)
    else:
        sentiments = lexicon_sentiment(texts)
    answered = np.array([bool(text) for text in texts], dtype=bool)  # nobody reacts to a last turn
    reactions = reactions_of_sentiments(np.where(answered, np.asarray(sentiments, dtype=np.float64), 0.0))
    return reactions._replace(known=answered)


class LISignal(NamedTuple):
    """A choice of `--li_signal`.

    Attributes:
        reactions: (trajectories, `SignalOptions`, trust_remote_code, training trajectories) -> reactions to all agent
            turns of the first, one trajectory after the other. What a signal learns, it learns from the last.
        help: one line for `--help`. uses_model: whether `--sentiment_model` is for it.
        needs_faces: whether it reads the listener's face, so that conversations without faces cannot be learned from.
        unknown: what `--unknown_reaction` is by default.
    """

    reactions: Callable[..., Reactions]
    help: str
    uses_model: bool = False
    needs_faces: bool = False
    unknown: str = "neutral"


LI_SIGNALS = {
    "face": LISignal(face_reactions, "the listener's face during the turn", needs_faces=True),
    "sentiment": LISignal(sentiment_reactions, "the sentiment of the user's next turn", uses_model=True),
    "reaction": LISignal(thumb_reactions, "the user's thumb or emoji under a chat's turn", unknown="left_out"),
    "hindsight": LISignal(hindsight_reactions, "the next turn, by users' words and scores", unknown="left_out"),
}


def li_targets(
    reactions: Reactions, reaction_type: str = "class", negative_affect: str = "zero", unknown: str = "neutral"
) -> np.ndarray:
    """(n,) float32 f_t in [-1, 1], the targets of the LI loss, by which a turn's reward follows the user's reaction.

    Args:
        reaction_type: `class`: 1 if pleased, else 0; `mean`: how pleased (of faces, the share of happy frames).
        negative_affect: `negative`: -1 if displeased; `zero`: no difference for displeased reactions.
        unknown: `left_out`: NaN, no target, where the reaction is not known; `neutral`: as of no reaction.
    """
    targets = reactions.strength if reaction_type == "mean" else reactions.polarity == 1
    if negative_affect == "negative":
        targets = np.where(reactions.polarity == -1, -1.0, targets)
    if unknown == "left_out" and reactions.known is not None:
        targets = np.where(reactions.known, targets, np.nan)
    return targets.astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Options


@dataclass(frozen=True)
class DataOptions:
    """Which conversations are read, and what of them."""

    data_dir: str = option(
        "./candor",
        "folder with one folder a conversation, in CANDOR's layout; or rated chats, a JSONL file or a folder of them",
    )
    rating_range: tuple[float, float] | None = option(
        None,
        "lowest and highest rating of rated chats (default: as the file's first line states)",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
    )
    transcript: str = option("cliffhanger", "which of CANDOR's transcripts is read", choices=TRANSCRIPTS)
    reward_class: str = option(
        "overall_affect",
        f"the survey question that is the score, one of {', '.join(QUESTIONS)}; people who did not answer it are "
        "left out",
        choices=QUESTIONS,
        metavar="CLASS",
    )
    context_turns: int = option(20, "turns of context before an agent turn", type=positive_int)
    train_size: int | None = option(500, "training conversations (fewer if there are fewer)", type=positive_int)


@dataclass(frozen=True)
class SignalOptions:
    """Where the targets of the LI loss come from."""

    li_signal: str | None = option(
        None,
        f"where LI targets come from: {'; '.join(f'{name}: {signal.help}' for name, signal in LI_SIGNALS.items())} "
        "(default: in stage 2 that of --affect_path's run, else face)",
        choices=LI_SIGNALS,
    )
    reaction_type: str = option(
        "class",
        "LI target: class: whether the reaction is pleased (a turn's most frequent face is happy; hindsight above the "
        "median); mean: how pleased (the share of happy frames; the rank of hindsight, in [0, 1])",
        choices=("class", "mean"),
    )
    negative_affect: str = option(
        "zero",
        "LI target of displeased reactions (anger, contempt, disgust, fear, sadness; hindsight below the median): "
        "zero: as --reaction_type says; negative: -1",
        choices=("zero", "negative"),
    )
    unknown_reaction: str | None = option(
        None,
        "LI target of turns whose reaction is not known (the face was lost, nothing was said next, no thumb): neutral: "
        "0 (with --reaction_type mean of hindsight 0.5); left_out: none, so that LI is learned from the other turns "
        "alone (default: left_out with reaction and hindsight, else neutral)",
        choices=("neutral", "left_out"),
    )
    sentiment_model: str | None = option(
        None,
        "hub id or folder of a text classifier for --li_signal sentiment (default: TextBlob's lexicon)",
        metavar="MODEL",
    )


# ---------------------------------------------------------------------------------------------------------------------
# The corpus and its splits


@dataclass
class Corpus:
    """All usable conversations of a folder, and what was dropped.

    Attributes:
        conversations: in the order of the hash of their ids.
        dropped: conversation id -> reason.
        dropped_trajectories: `id/flip` -> reason.
        trajectories: conversation id -> its usable trajectories for the reward class.
    """

    conversations: list[Conversation]
    dropped: dict[str, str]
    dropped_trajectories: dict[str, str]
    trajectories: dict[str, list[Trajectory]]

    def off_scale(self) -> dict[str, dict]:
        """Question -> how many answers to it are outside its limits, an example, and the limits."""
        found: dict[str, list[float]] = {}
        for question, answers in (item for c in self.conversations for item in c.off_scale.items()):
            found.setdefault(question, []).extend(answers)
        return {
            question: {"answers": len(answers), "example": answers[0], "limits": list(QUESTIONS[question].limits)}
            for question, answers in sorted(found.items())
        }

    def counts(self) -> dict:
        """Counts for a run's JSON file: numbers and reasons, no ids."""
        skipped = sum((c.skipped_turns for c in self.conversations), Counter())
        off_scale = self.off_scale()
        return {
            "conversations": len(self.conversations),
            "conversations_without_faces": sum(bool(c.no_faces) for c in self.conversations),
            "trajectories": sum(map(len, self.trajectories.values())),
            "turns": sum(len(c.turns) for c in self.conversations),
            "dropped_conversations": len(self.dropped),
            "dropped_conversations_by_reason": by_count(self.dropped.values()),
            "dropped_trajectories": len(self.dropped_trajectories),
            "dropped_trajectories_by_reason": by_count(self.dropped_trajectories.values()),
            "skipped_transcript_rows": dict(sorted(skipped.items())),
            "answers_off_scale": sum(found["answers"] for found in off_scale.values()),
            "answers_off_scale_by_question": off_scale,
        }

    def numbers(self) -> dict[str, int]:
        """The counts that may be sent to wandb: without reasons, which could quote a file."""
        return {name: value for name, value in self.counts().items() if isinstance(value, int)}

    def describe(self) -> str:
        """The summary that a run prints first: counts, every dropped conversation with its reason, and answers that are
        outside their question's limits with what to do."""
        counts = self.counts()
        lines = [
            f"Read {counts['conversations']:,} conversations, {counts['trajectories']:,} trajectories, "
            f"{counts['turns']:,} turns."
        ]
        if self.dropped:
            found = len(self.dropped) + len(self.conversations)
            lines.append(f"Dropped {len(self.dropped):,} of {found:,} conversations:")
            lines += [f"  {one_line(f'{printable(name)}: {reason}')}" for name, reason in sorted(self.dropped.items())]
        for reason, number in counts["dropped_trajectories_by_reason"].items():
            lines.append(f"Dropped {number:,} trajectories: {reason}.")
        if number := counts["conversations_without_faces"]:
            lines.append(f"{number:,} of the conversations have no faces; what is measured by faces is of the others.")
        for reason, number in counts["skipped_transcript_rows"].items():
            lines.append(f"Skipped {number:,} transcript rows: {reason}.")
        lines += [_said_of_off_scale(*item) for item in counts["answers_off_scale_by_question"].items()]
        return "\n".join(lines)


def _said_of_off_scale(question: str, found: dict) -> str:
    low, high = found["limits"]
    return (
        f"Left out {found['answers']:,} answers to {question} that are not from {low} to {high}, such as "
        f"{found['example']:g}: if they are right, correct the question's row in geli/data/questions.py "
        "(docs/extending.md)."
    )


def read_corpus(
    data_dir: str | Path, reward_class: str, transcript: str = "cliffhanger", cache: str | Path | None = None,
    needs_faces: bool = False, rating_range: Range | None = None,
) -> Corpus:  # fmt: skip
    """Reads every conversation in `data_dir`, in an order that does not depend on the file system.

    Args:
        reward_class: a key of `QUESTIONS`.
        cache: folder that keeps what was read (`geli.data.cache.ConversationCache`); None for no cache.
        needs_faces: drop the trajectories of conversations without faces. The conversations keep their places, so that
            splits are the same whether faces are needed or not.

    Raises:
        UserError: if there is no folder, nothing usable in it, or no answer to `reward_class`.
    """
    conversations, dropped = read_conversations(data_dir, transcript, cache, rating_range)
    asked = frozenset().union(*(c.questions for c in conversations))
    if reward_class not in asked:
        raise UserError(
            f"--reward_class {reward_class}: no survey.csv or chat under {data_dir} has it; "
            f"present: {', '.join(sorted(asked)) or 'none of the known questions'}"
        )
    trajectories, dropped_trajectories = {}, {}
    for conversation in conversations:
        trajectories[conversation.id] = []
        for flip, user in zip((False, True), conversation.speakers, strict=True):
            if user == "assistant" and user not in conversation.answers:
                continue  # nobody has asked it
            try:
                if needs_faces and conversation.no_faces:
                    raise Dropped(f"no faces to learn from ({conversation.no_faces})")
                trajectories[conversation.id].append(make_trajectory(conversation, flip, reward_class))
            except Dropped as reason:
                dropped_trajectories[f"{conversation.id}/{int(flip)}"] = str(reason)
    corpus = Corpus(conversations, dropped, dropped_trajectories, trajectories)
    if not any(trajectories.values()):
        off_scale = corpus.off_scale()
        hint = f". {_said_of_off_scale(reward_class, off_scale[reward_class])}" if reward_class in off_scale else ""
        reasons = common_reasons(dropped_trajectories) + hint
        raise UserError(f"--reward_class {reward_class}: no trajectory under {data_dir} can be used: {reasons}")
    return corpus


def split(
    corpus: Corpus, train_size: int, val_except: frozenset[str] | None = None
) -> tuple[list[Trajectory], list[Trajectory]]:
    """Training and validation trajectories.

    Validation is the last 50 conversations in hash order (of fewer than 500, a tenth, at least one). They do not
    depend on the reward class, so an encoder trained for one class has not seen another's validation set. Training is
    the first `train_size` of the others that have a trajectory.

    Args:
        val_except: validate on every conversation after the training ones but these (ids of those that an earlier stage
            trained on); None: on the last ones alone.
    """
    ordered = corpus.conversations
    held_out = 50 if len(ordered) >= 500 else max(1, len(ordered) // 10)
    usable = [place for place, c in enumerate(ordered[:-held_out]) if corpus.trajectories[c.id]]
    training = [ordered[place].id for place in usable[:train_size]]
    first = usable[:train_size][-1] + 1 if val_except is not None and training else len(ordered) - held_out
    validation = [c.id for c in ordered[first:] if c.id not in (val_except or ())]
    return (
        [t for i in training for t in corpus.trajectories[i]],
        [t for i in validation for t in corpus.trajectories[i]],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def state_turns(conversation: Conversation, index: int, user: str, context_turns: int) -> tuple[tuple[bool, str], ...]:
    """(is_agent, utterance) of the last `context_turns` turns before turn `index`."""
    before = conversation.turns[max(0, index - context_turns) : index]
    return tuple((turn.speaker != user, turn.utterance) for turn in before)


def turn_text(conversation: Conversation, index: int, user: str, context_turns: int) -> tuple[str, str]:
    """State and action of turn `index` as text: the last `context_turns` turns before it (`context_text`), and `AI: ` +
    the turn itself."""
    context = context_text(state_turns(conversation, index, user, context_turns))
    return context, f"AI: {conversation.turns[index].utterance}"


def turn_texts(trajectory: Trajectory, context_turns: int) -> list[tuple[str, str]]:
    """(context, response) of each agent turn of a trajectory."""
    return [turn_text(trajectory.conversation, i, trajectory.user, context_turns) for i in trajectory.agent_turns]


def next_user_utterance(conversation: Conversation, index: int, user: str) -> str:
    """What `user` says first after turn `index`; empty if nothing."""
    return next((turn.utterance for turn in conversation.turns[index + 1 :] if turn.speaker == user), "")


def with_rating(text: tuple[str, str], answer: float) -> tuple[str, str]:
    """A (context, response) with the user's answer appended, for `--curriculum`."""
    context, response = text
    return context, f"{response} User's rating: {answer:g}"


def rating_probability(curriculum: bool, exposure: bool, epoch: int, epochs: int) -> float:
    """The probability that a training turn shows the user's answer in `epoch` (1 to `epochs`): with
    `--curriculum_exposure` it falls linearly from 1 to 0; with `--curriculum` alone it is 1."""
    if exposure:
        return 1.0 - (epoch - 1) / max(epochs - 1, 1)
    return float(curriculum)


# ---------------------------------------------------------------------------------------------------------------------
# The data of stages 1 and 2


NO_FACE = -1  # in place of an index into `FACES`


@dataclass(frozen=True)
class TurnSet:
    """All agent turns of some trajectories, one trajectory after the other.

    Attributes:
        trajectories: n trajectories.
        offsets: (n + 1,) turns of trajectory i are offsets[i]:offsets[i + 1].
        texts: (N,) pairs (context, response).
        affects: (N,) indices into `FACES`, `NO_FACE` in conversations without faces.
        targets: (N,) float32 f_t of the LI loss, NaN where there is none: the signal needs faces and the conversation
            has none, or unknown reactions are left out.
        labels: (N,) the class of the user's reaction that the targets come from.
        known: (N,) whether there was a reaction. n_words: (N,) words of each turn.
        scores: (n,) R in points.
        shares: (N,) float32 T times a turn's share of the score, in points, so that their mean over a trajectory is R;
            None unless a language model shared the scores out (`with_shares`).
    """

    trajectories: list[Trajectory]
    offsets: np.ndarray
    texts: list[tuple[str, str]]
    affects: np.ndarray
    targets: np.ndarray
    labels: np.ndarray
    known: np.ndarray
    n_words: np.ndarray
    scores: np.ndarray
    shares: np.ndarray | None = None

    @classmethod
    def from_trajectories(
        cls, trajectories: list[Trajectory], context_turns: int, signal: SignalOptions = SignalOptions(),
        trust_remote_code: bool = False, training: list[Trajectory] | None = None,
    ):  # fmt: skip
        """The agent turns of `trajectories`; LI targets by `signal` (else faces), learned on `training` or those."""
        li_signal = LI_SIGNALS[signal.li_signal or "face"]
        reactions = li_signal.reactions(trajectories, signal, trust_remote_code, training or trajectories)
        unknown = signal.unknown_reaction or li_signal.unknown
        targets = li_targets(reactions, signal.reaction_type, signal.negative_affect, unknown)
        turns = _agent_turns(trajectories)
        affects = np.array([turn.affect for turn in turns], dtype=int)
        faceless = np.array([bool(t.conversation.no_faces) for t in trajectories for _ in t.agent_turns], dtype=bool)
        affects[faceless] = NO_FACE
        if li_signal.needs_faces:
            targets[faceless] = np.nan
        return cls(
            trajectories=trajectories,
            offsets=np.concatenate([[0], np.cumsum([len(t.agent_turns) for t in trajectories])]).astype(int),
            texts=[text for t in trajectories for text in turn_texts(t, context_turns)],
            affects=affects,
            targets=targets,
            labels=reactions.labels,
            known=np.ones(len(turns), dtype=bool) if reactions.known is None else reactions.known,
            n_words=np.array([turn.n_words for turn in turns], dtype=int),
            scores=np.array([t.score for t in trajectories]),
        )

    def with_shares(self, shares: Mapping[str, TrajectoryShares]) -> "TurnSet":
        """These turns with a language model's shares, which they all must have (see `split_by_shares`)."""
        values = [
            len(t.agent_turns) * shares[t.key].turns[t.conversation.turns[i].turn_id]
            for t in self.trajectories
            for i in t.agent_turns
        ]
        return replace(self, shares=np.array(values, dtype=np.float32))

    def rated_texts(self) -> list[tuple[str, str]]:
        """The texts with each trajectory's answer appended, for `--curriculum`."""
        answers = np.repeat([t.answer for t in self.trajectories], np.diff(self.offsets))
        return [with_rating(text, answer) for text, answer in zip(self.texts, answers, strict=True)]

    @property
    def surface(self) -> np.ndarray:
        """(N, 3) float32 what is on the surface of each response (`geli.data.words.SURFACE`)."""
        return np.array([surface(response) for _, response in self.texts], dtype=np.float32)

    def ids(self, turns: Iterable[int]) -> list[str]:
        """`conversation/flip/turn_id` of these turns (indices into the arrays over turns)."""
        names = []
        for turn in turns:
            i = np.searchsorted(self.offsets, turn, "right") - 1
            names.append(self.trajectories[i].turn_name(turn - self.offsets[i]))
        return names

    def turns_of(self, i: int) -> slice:
        """Where the turns of trajectory i are in the arrays over turns."""
        return slice(self.offsets[i], self.offsets[i + 1])

    def __len__(self) -> int:
        return len(self.texts)


def split_by_shares(
    trajectories: Iterable[Trajectory], shares: Mapping[str, TrajectoryShares]
) -> tuple[list[Trajectory], dict[str, str]]:
    """The trajectories whose turns all have a language model's shares, and key -> reason of the others."""
    kept, dropped = [], {}
    for trajectory in trajectories:
        found = shares.get(trajectory.key)
        if found is None:
            dropped[trajectory.key] = "no shares in the file of --llm_shares"
        elif found.data != fingerprint([trajectory]):
            dropped[trajectory.key] = "has changed since its shares were made (its text, its faces or its score)"
        elif not found.turns.keys() >= {trajectory.conversation.turns[i].turn_id for i in trajectory.agent_turns}:
            dropped[trajectory.key] = "turns without a share in the file of --llm_shares"
        else:
            kept.append(trajectory)
    return kept, dropped


def load_turns(
    data: DataOptions, signal: SignalOptions, *, cache: Path | None, learns_li: bool = True,
    val_except: frozenset[str] | None = None, validate: bool, trust_remote_code: bool = False,
    shares: Mapping[str, TrajectoryShares] | None = None,
) -> tuple[Corpus, TurnSet, TurnSet]:  # fmt: skip
    """The corpus, with its training and validation turns; prints how much was read, and what was dropped.

    Args:
        cache: folder of the cache; None for no cache.
        learns_li: whether LI is learned, for which `face` needs faces. val_except: as `val_except` of `split`.
        validate: whether validation turns are needed.
        shares: a language model's; training trajectories without them are dropped.

    Raises:
        UserError: if there is nothing to train on, or nothing to validate on although it is needed.
    """
    needs_faces = learns_li and LI_SIGNALS[signal.li_signal or "face"].needs_faces
    corpus = read_corpus(data.data_dir, data.reward_class, data.transcript, cache, needs_faces, data.rating_range)
    trajectories, held_out = split(corpus, data.train_size or len(corpus.conversations), val_except)
    if shares is not None:
        trajectories, dropped = split_by_shares(trajectories, shares)
        corpus.dropped_trajectories.update(dropped)
    print(corpus.describe())
    if shares is not None and dropped and not trajectories:
        raise UserError(f"--llm_shares: expected shares to train on, found none to use: {common_reasons(dropped)}")
    training, validation = (
        TurnSet.from_trajectories(part, data.context_turns, signal, trust_remote_code, trajectories)
        for part in (trajectories, held_out)
    )
    if shares is not None:
        training = training.with_shares(shares)
    for name, turns, needed in (("training", training, True), ("validation", validation, validate)):
        n = len({t.conversation.id for t in turns.trajectories})
        print(f"{name}: {n:,} conversations, {len(turns.trajectories):,} trajectories, {len(turns):,} turns")
        if needed and learns_li and len(turns) and np.isnan(turns.targets).all():
            raise UserError(f"--li_signal {signal.li_signal}: none of the {len(turns):,} {name} turns has a reaction")
        if needed and not len(turns):
            raise UserError(
                f"--data_dir {data.data_dir}: none of the {name} conversations has an answer to {data.reward_class}"
                f"{' and faces' if needs_faces else ''} ({len(corpus.conversations)} conversations are usable; at "
                "least 2 are needed)"
            )
    return corpus, training, validation


# ---------------------------------------------------------------------------------------------------------------------
# The data of stage 3


def make_prompts(trajectories: Iterable[Trajectory], context_turns: int) -> list[Prompt]:
    """A prompt for every agent turn: the state before it, and what the human said."""
    prompts = []
    for trajectory in trajectories:
        texts = tuple(turn_texts(trajectory, context_turns))
        for position, (context, response) in enumerate(texts):
            human, name = response.removeprefix("AI: "), trajectory.turn_name(position)
            turns = state_turns(
                trajectory.conversation, trajectory.agent_turns[position], trajectory.user, context_turns
            )
            prompts.append(Prompt(prompt_text(context), context, human, texts, position, name, turns))
    return prompts


def load_prompts(
    data: DataOptions, *, cache: Path | None, seed: int, val_prompts: int, needs_training: bool, needs_held_out: bool
) -> tuple[list[Prompt], list[Prompt], dict[str, int]]:
    """Training prompts, at most `val_prompts` held-out prompts (drawn by `seed`), and the counts of what was read.
    Raises a `UserError` if there are no prompts of a kind that is needed."""
    corpus = read_corpus(data.data_dir, data.reward_class, data.transcript, cache, rating_range=data.rating_range)
    print(corpus.describe())
    parts = split(corpus, data.train_size or len(corpus.conversations))
    training, validation = (make_prompts(part, data.context_turns) for part in parts)
    held_out = [validation[i] for i in np.random.default_rng(seed).permutation(len(validation))[:val_prompts]]
    print(f"prompts: {len(training):,} for training, {len(held_out):,} of {len(validation):,} held out for validation")
    for name, prompts, needed in (("training", training, needs_training), ("held-out", held_out, needs_held_out)):
        if needed and not prompts:
            raise UserError(
                f"--data_dir {data.data_dir}: no {name} prompt in {len(corpus.conversations)} conversations"
            )
    return training, held_out, corpus.numbers()
