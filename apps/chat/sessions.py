"""The conversations of the people who have the page open: one session for each browser window."""

import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from apps.chat.collect import Collection
from apps.chat.survey import new_user_id, read_answer
from apps.chat.talk import Talk
from geli.run.errors import UserError

IDLE = 1800.0  # seconds without a message after which somebody's place goes to another person who waits for one
COLUMNS = "AB"


class Phase(Enum):
    """What a session is at."""

    WAITING = "waiting"  # for a place
    CONSENT = "consent"  # is being asked for
    TALKING = "talking"
    RATING = "rating"
    DONE = "done"  # rated, and stored if the person agreed
    LEFT = "left"


@dataclass(eq=False)
class Session:
    """What is open in one browser window: a conversation, or two side by side with the same messages.

    Its methods can be called by any thread. They raise a `UserError` if the person asks for something impossible.

    Attributes:
        new_talks: makes the conversations, one for each column. collection: where they are stored; None: nowhere.
        camera: whether one is offered, if the person agrees to storing.
        key: names the session in the addresses of its page; nobody else knows it.
        agreed: to storing. growing: the reply so far, by column; None: no reply is being made.
    """

    new_talks: Callable[[], list[Talk]]
    collection: Collection | None
    camera: bool = False
    key: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    phase: Phase = Phase.WAITING
    agreed: bool = False
    growing: list[str] | None = None

    def __post_init__(self):
        self.lock, self.active = threading.RLock(), time.monotonic()
        self.talks = self.new_talks()

    @property
    def consent_text(self) -> str:
        """What is stored where."""
        return self.collection.consent_text(self.talks[0].user) if self.collection else "Nothing is stored."

    def begin(self) -> None:
        """Begins another conversation; what the person agreed to stays."""
        with self.lock:
            self._expect(Phase.DONE)
            self.talks, self.active, self.phase = self.new_talks(), time.monotonic(), Phase.TALKING
            self._agree(self.agreed)

    def enter(self) -> None:
        """The session gets a place."""
        with self.lock:
            self.phase, self.active = (Phase.CONSENT if self.collection else Phase.TALKING), time.monotonic()

    def consent(self, agreed: bool) -> None:
        """The person agrees that the conversation is stored, or does not."""
        with self.lock:
            self._expect(Phase.CONSENT)
            self._agree(agreed)
            self.phase = Phase.TALKING

    # Talking

    @property
    def can_finish(self) -> bool:
        """Whether there is a reply, and none is being made."""
        return self.growing is None and any(turn.utterance for talk in self.talks for turn in talk.replies)

    @property
    def reading(self) -> bool:
        """Whether a reply is before the person's eyes."""
        shown = any(self.growing) if self.growing is not None else self._last_is(by_agent=True)
        return shown and self.phase is Phase.TALKING

    def say(self, text: str) -> None:
        """Adds the person's message to all columns."""
        with self.lock:
            self._expect_idle()
            for talk in self.talks:
                talk.say(text)
            self.active = time.monotonic()

    def reply(self) -> Iterator[None]:
        """Generates the replies of all columns at the same time; yields whenever there is more to show. Stops, and
        leaves no reply, when the person leaves. Does nothing if there is nothing to reply to."""
        with self.lock:
            if self.growing is not None or self.phase is not Phase.TALKING or not self._last_is(by_agent=False):
                return
            talks = self.talks
            replies = {column: talk.reply() for column, talk in enumerate(talks)}
            self.growing = [""] * len(talks)
        try:
            while replies:
                for column in list(replies):
                    with self.lock:
                        if self.phase is not Phase.TALKING or self.talks is not talks:
                            return
                        text = next(replies[column], None)
                        if text is None:
                            del replies[column]
                        else:
                            self.growing[column] = text
                yield
        finally:
            with self.lock:
                self.growing = None

    def retry(self) -> None:
        """Takes the last replies back."""
        with self.lock:
            self._expect_idle()
            for talk in self.talks:
                talk.drop_reply()

    def undo(self) -> str:
        """Takes the last message back, with the replies to it; returns the message."""
        with self.lock:
            self._expect_idle()
            message, *_ = [talk.undo() for talk in self.talks]
            return message

    def writes(self) -> None:
        """The person begins to write."""
        with self.lock:
            for talk in self.talks:
                talk.writes()

    def react(self, column: int, face: str) -> None:
        """The person's reaction to the last reply of a column."""
        with self.lock:
            self._expect_idle()
            self.talks[column].react(face)

    def see(self, probabilities: Sequence[float] | None, camera: str) -> None:
        """What a camera sees of the person's face; counts while a reply is read. `camera`: how it was read."""
        with self.lock:
            if self.camera and self.agreed and self.reading:
                for talk in self.talks:
                    talk.see(probabilities)
                    talk.notes["camera"] = camera

    # Ending

    def finish(self) -> None:
        """Asks for ratings."""
        with self.lock:
            self._expect_idle()
            if not self.can_finish:
                raise UserError("there is nothing to rate yet")
            self.writes()
            self.phase = Phase.RATING

    def go_on(self) -> None:
        """Talks on, without having rated."""
        with self.lock:
            self._expect(Phase.RATING)
            self.phase = Phase.TALKING
            for talk in self.talks:
                talk.reads()

    def rate(self, answers: Sequence[dict[str, str]], agreed: bool) -> None:
        """Ends the conversation with the answers of each column, and stores it if the person agrees to that."""
        with self.lock:
            self._expect(Phase.RATING)
            for row in answers:
                for question, answer in row.items():
                    read_answer(question, answer)
            for talk, row in zip(self.talks, answers, strict=True):
                for question, answer in row.items():
                    talk.rate(question, answer)
            self._agree(agreed)
            self._store()
            self.phase = Phase.DONE

    def leave(self) -> None:
        """Ends the session. A conversation that was not finished is stored as broken off, if the person agreed."""
        with self.lock:
            unfinished = self.phase in (Phase.TALKING, Phase.RATING)
            self.phase = Phase.LEFT
            if unfinished:
                try:
                    self._store()
                except UserError as error:  # nobody is left to tell, and others have to be stored
                    print(f"Not stored: {error}", file=sys.stderr, flush=True)

    def _agree(self, agreed: bool) -> None:
        self.agreed = bool(agreed and self.collection)
        for talk in self.talks:
            talk.agreed = self.agreed

    def _store(self) -> None:
        """Stores the conversations whose person agreed, and prints what is there now."""
        stored = [path for talk in self.talks if talk.agreed and (path := self.collection.store(talk))]
        if stored:
            finished, broken_off = self.collection.counts()
            print(f"{self.collection.folder}: {finished:,} finished, {broken_off:,} broken off", flush=True)

    def _last_is(self, by_agent: bool) -> bool:
        """Whether the last turn is the policy's, or the person's."""
        turns = self.talks[0].turns
        return bool(turns) and turns[-1].by_agent == by_agent

    def _expect(self, phase: Phase) -> None:
        if self.phase is not phase:
            raise UserError("that is not possible now")

    def _expect_idle(self) -> None:
        self._expect(Phase.TALKING)
        if self.growing is not None:
            raise UserError("wait for the reply")


class Sessions:
    """All sessions, and who may talk: at most `people` at once, the others wait in the order in which they came.

    Args:
        new_talk: (user, seed, base) -> `Talk`. compare: two columns, of which a coin decides which is the base policy.
        collection: where conversations are stored. people: at once.
        user: id of all who talk; None: each has a random one. seed: of replies; None: another for each conversation.
    """

    def __init__(
        self,
        new_talk: Callable[..., Talk],
        compare: bool,
        collection: Collection | None,
        people: int,
        user: str | None = None,
        seed: int | None = None,
    ):
        self.new_talk, self.compare, self.collection, self.people = new_talk, compare, collection, people
        self.user, self.seed = user, seed
        self._all: dict[str, Session] = {}  # by the window's id
        self._lock = threading.RLock()

    def open(self, window: str, camera: bool = False) -> Session:
        """A new session, which waits or has a place."""
        user = self.user or new_user_id()
        session = Session(lambda: self._talks(user), self.collection, camera)
        with self._lock:
            self.leave(window)
            self._all[window] = session
            self._give_places()
        return session

    def find(self, window: str) -> Session | None:
        """The session of a window."""
        return self._all.get(window)

    def by_key(self, key: str) -> Session | None:
        """The session with this key."""
        return next((session for session in [*self._all.values()] if session.key == key), None)

    def place_in_queue(self, window: str) -> int:
        """How many wait before this window, and itself; 0 if it does not wait."""
        with self._lock:
            self._give_places()
            waiting = [name for name, session in self._all.items() if session.phase is Phase.WAITING]
            return waiting.index(window) + 1 if window in waiting else 0

    def leave(self, window: str) -> None:
        """The window was closed."""
        with self._lock:
            session = self._all.pop(window, None)
        if session:
            session.leave()
            self._give_places()

    def close(self) -> None:
        """Ends all sessions."""
        for window in [*self._all]:
            self.leave(window)

    def _give_places(self) -> None:
        with self._lock:
            waiting = [session for session in self._all.values() if session.phase is Phase.WAITING]
            placed = [s for s in self._all.values() if s.phase not in (Phase.WAITING, Phase.LEFT)]
            if waiting:
                for session in [s for s in placed if time.monotonic() - s.active > IDLE and s.growing is None]:
                    session.leave()
                    placed.remove(session)
            for session in waiting[: max(0, self.people - len(placed))]:
                session.enter()

    def _talks(self, user: str) -> list[Talk]:
        seed = secrets.randbits(32) if self.seed is None else self.seed
        bases = [False, True] if self.compare else [False]
        if secrets.randbelow(2):
            bases.reverse()
        talks = [self.new_talk(user=user, seed=seed, base=base) for base in bases]
        if self.compare:
            for column, talk, other in zip(COLUMNS, talks, talks[::-1], strict=True):
                talk.notes = {"column": column, "beside": other.id}
        return talks
