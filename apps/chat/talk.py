"""A conversation of a person (User) with a policy (AI)."""

import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from apps.chat.partner import Partner
from apps.chat.survey import new_user_id, partner_id, read_answer
from data_utils import state_turns, turn_text
from geli.data.candor import FACES, MOST_CHARACTERS, NEUTRAL, Conversation, Turn
from geli.nets.prompts import Prompt, prompt_text
from geli.reward import GELIReward
from geli.rl.rollout import draw_uniforms
from geli.run.errors import UserError

# Seconds that a reply lasts at least, and between two replies at least. So each has a whole second, and so a frame of a
# face, for itself; only scripts are faster.
SHORTEST, GAP = 1.0, 0.01


def as_transcribed(text: str) -> str:
    """A text in one line, as transcripts have it: the form in which policy, reward and file get what was said."""
    return " ".join(text.replace("\0", " ").split())


@dataclass
class TalkTurn:
    """One turn of a talk.

    Attributes:
        by_agent: whether the policy said it. text: as it was written.
        start, stop: seconds from the beginning of the talk. A reply lasts until the person begins to write.
        prompt, uniforms, features: of a reply: the state that it answers, what it was sampled with, and its features
            for the reward.
        reaction: of a reply: the face of `FACES` with which the person reacted to it.
    """

    by_agent: bool
    text: str
    start: float
    stop: float
    prompt: Prompt | None = None
    uniforms: torch.Tensor | None = None
    features: torch.Tensor | None = None
    reaction: str | None = None

    @property
    def utterance(self) -> str:
        """The text `as_transcribed`."""
        return as_transcribed(self.text)


@dataclass
class Talk:
    """A conversation. It belongs to one person and is used by one thread at a time; partner and rewards are shared.

        talk = Talk(partner, rewards)
        talk.say("Hello!")
        for text in talk.reply():  # the reply so far, again and again
            show(text)
        talk.rewards()

    Attributes:
        partner: whom the person talks to. scorer: gives the turn rewards; None: there are none.
        base: talk to the policy without its adapter.
        user, agent: speaker ids. id: of the conversation. agreed: whether the person agreed that it may be stored.
        seed: of the replies' sampling. clock: gives seconds.
        turns: what was said. answers: question of `QUESTIONS` -> answer.
        frames: second -> probabilities of `FACES`, or None without a face, of the person, from a camera.
        notes: more about it, for `metadata.json`.
    """

    partner: Partner
    scorer: GELIReward | None = None
    base: bool = False
    user: str = field(default_factory=new_user_id)
    agreed: bool = False
    seed: int = field(default_factory=lambda: secrets.randbits(32))
    clock: Callable[[], float] = time.monotonic
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    turns: list[TalkTurn] = field(default_factory=list)
    answers: dict[str, float] = field(default_factory=dict)
    frames: dict[int, Sequence[float] | None] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self._began, self._writing = self.clock(), None
        self._random = torch.Generator().manual_seed(self.seed)

    @property
    def agent(self) -> str:
        """The policy's speaker id."""
        return partner_id(self.partner.name + ("-base" if self.base and self.partner.tuned else ""))

    @property
    def replies(self) -> list[TalkTurn]:
        """The policy's turns."""
        return [turn for turn in self.turns if turn.by_agent]

    def now(self) -> float:
        """Seconds since the talk began."""
        return self.clock() - self._began

    # Saying and replying

    def writes(self) -> None:
        """The person begins to write the next message, and so no longer reads the reply. A page or terminal that sees
        it calls this; without it, a message begins where the reply was complete."""
        if self._writing is None:
            self._writing = self.now()
            self._stop_reading(self._writing)

    def reads(self) -> None:
        """The person has begun to write, but gives that up and reads on."""
        self._writing = None

    def say(self, text: str) -> None:
        """Adds the person's message.

        Raises:
            UserError: if it is empty, or longer than a transcript may have it.
        """
        text = text.encode("utf-8", "replace").decode().strip()
        if not as_transcribed(text) or len(text) > MOST_CHARACTERS:
            raise UserError(f"a message has 1 to {MOST_CHARACTERS:,} characters, this one has {len(text):,}")
        after = self.turns[-1].stop if self.turns else 0.0
        start = max(after, after if self._writing is None else self._writing)
        self.turns.append(TalkTurn(False, text, start, max(start, self.now())))
        self._writing = None

    def reply(self) -> Iterator[str]:
        """The reply to the last message, as it grows: the reply so far, again and again, and the whole reply last. It
        becomes a turn, with its features, when the iterator is exhausted; one that is given up leaves nothing.

        Raises:
            UserError: if there is no message to reply to.
        """
        if not self.turns or self.turns[-1].by_agent:
            raise UserError("there is no message to reply to")
        return self._generate()

    def _generate(self) -> Iterator[str]:
        prompt = self.prompt(len(self.turns))
        uniforms = draw_uniforms(1, self.partner.policy.max_new_tokens, self._random)
        start, text = None, ""
        for text in self.partner.stream(prompt, uniforms, self.base):
            start = max(self.turns[-1].stop + GAP, self.now()) if start is None else start
            yield text
        turn = TalkTurn(True, text, start, max(start + SHORTEST, self.now()), prompt, uniforms)
        self.turns.append(turn)
        if self.scorer:
            turn.features = self._features(prompt, turn.utterance)

    def retry(self) -> Iterator[str]:
        """Takes the last reply back, and generates another one; as `reply`."""
        self.drop_reply()
        return self.reply()

    def drop_reply(self) -> None:
        """Takes the reply to the last message back, if there is one."""
        self.reads()
        if self.turns and self.turns[-1].by_agent:
            self.turns.pop()

    def undo(self) -> str:
        """Takes the last message back, with the reply to it; returns the message.

        Raises:
            UserError: if there is none.
        """
        if not self.turns:
            raise UserError("nothing has been said yet")
        while self.turns[-1].by_agent:
            self.turns.pop()
        return self.turns.pop().text

    def other_reply(self) -> Iterator[str]:
        """What the base policy (or the tuned one, if this talks to the base) replies instead of the last reply, with
        the same random numbers. It does not become a turn; as `reply`."""
        last = self._last_reply()
        return self.partner.stream(last.prompt, last.uniforms, not self.base)

    def prompt(self, index: int) -> Prompt:
        """The state before turn `index`, with the history that the policy saw in training."""
        said = (turn for turn in reversed(self.turns[:index]) if turn.utterance)  # readers skip empty turns
        window = [*islice(said, self.partner.context_turns)][::-1]
        turns = [(turn.by_agent, turn.utterance) for turn in window] + [(True, "")]  # the reply, which is not there yet
        speakers = (self.user, self.agent)
        turns = tuple(Turn("", speakers[by_agent], 0, 0, text, 0, NEUTRAL, 0) for by_agent, text in turns)
        place = (Conversation(self.id, speakers, turns, {}, frozenset()), len(window), self.user, len(turns))
        return Prompt(prompt_text(turn_text(*place)[0]), turn_text(*place)[0], human="", turns=state_turns(*place))

    # What the person thinks of it

    def rewards(self) -> list[float]:
        """The reward of every reply so far; none without a scorer."""
        return self.scorer.rewards([turn.features for turn in self.replies]) if self.scorer else []

    def reward_instead(self, text: str) -> float:
        """The reward that the last reply would have had if it were `text`."""
        features = self._features(self._last_reply().prompt, as_transcribed(text))
        return self.scorer.rewards([*(turn.features for turn in self.replies[:-1]), features])[-1]

    def react(self, face: str) -> None:
        """The person's reaction to the last reply: a face of `FACES`.

        Raises:
            UserError: if there is no reply.
        """
        if face not in FACES:
            raise ValueError(f"face {face!r}, expected one of {', '.join(FACES)}")
        self._last_reply().reaction = face

    def see(self, probabilities: Sequence[float] | None) -> None:
        """A camera's frame of the person now: the probabilities of `FACES`, or None if it shows no face. The last frame
        of a second counts."""
        self.frames[int(self.now())] = probabilities

    def rate(self, question: str, answer: str) -> None:
        """The person's answer to a question of the survey. The last answer to a question counts.

        Raises:
            UserError: if it cannot be one.
        """
        number = read_answer(question, answer)
        if self._writing is None:
            self._stop_reading(self.now())
        self.answers[question] = number

    def _features(self, prompt: Prompt, reply: str) -> torch.Tensor:
        """(hidden,) features of a reply to a state, for the reward."""
        return self.scorer.features([(prompt.context, f"AI: {reply}")])[0]

    def _last_reply(self) -> TalkTurn:
        if not self.turns or not self.turns[-1].by_agent:
            raise UserError("there is no reply yet")
        return self.turns[-1]

    def _stop_reading(self, now: float) -> None:
        if self.turns and self.turns[-1].by_agent:
            self.turns[-1].stop = max(now, self.turns[-1].stop)
