"""The page on which people talk: Gradio's components, and what happens on their events."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from apps.chat import bubbles
from apps.chat.sessions import COLUMNS, Phase, Session, Sessions
from apps.sockets import is_loopback
from geli.data.candor import MOST_CHARACTERS
from geli.data.questions import QUESTIONS
from geli.run.errors import UserError

STYLE, SCRIPT = (Path(__file__).with_name(name) for name in ("page.css", "page.js"))
CAMERA = """
<div class="camera">
  <button type="button" data-camera="start">Use the camera</button>
  <span class="light" role="status">Camera on</span>
  <button type="button" data-camera="stop">Stop the camera</button>
  <span class="hint">While you read a reply, this machine looks at your face once a second and turns the picture into
  eight numbers: how much it looks like happiness, sadness and so on. The numbers are stored with the conversation. The
  picture is thrown away at once; it is never stored or sent.</span>
  <span class="problem" role="alert"></span>
</div>
"""
WAIT = "All places are taken. You are number {place} in the queue; this page goes on by itself."
CLOSED = "This conversation was closed, because the page was left or nothing was said for a long time. Reload the page."


@dataclass(frozen=True)
class Survey:
    """What people are asked at the end: `score` must be answered, `more` need not."""

    score: str
    more: Sequence[str] = ()


class Page:
    """The components of the page, and what happens on their events.

    Args:
        gr: the module gradio. camera: whether the camera is offered to people who sit at this machine.

    Attributes:
        blocks: the `gradio.Blocks`.
    """

    def __init__(self, gr: ModuleType, sessions: Sessions, survey: Survey, camera: bool):
        self.gr, self.sessions, self.survey, self.camera = gr, sessions, survey, camera
        self.columns = COLUMNS[: 1 + sessions.compare]
        with gr.Blocks(title="Talk", analytics_enabled=False) as self.blocks:
            self._lay_out()
            self._connect()

    def _lay_out(self) -> None:
        """Makes the components. Which of them are visible depends on the phase of the session."""
        gr = self.gr
        self.state, self.timer = gr.HTML(elem_id="state"), gr.Timer(2, active=False)
        self.notice = gr.HTML(visible=False, elem_classes="notice")
        with gr.Column(visible=False) as self.asking:
            self.consent_text = gr.HTML(elem_classes="notice")
            with gr.Row():
                self.agree = gr.Button("I agree", variant="primary", elem_id="agree")
                self.decline = gr.Button("Talk without storing", elem_id="decline")
        with gr.Column(visible=False) as self.talking:
            with gr.Row(elem_classes="columns"):
                self.shown = [gr.HTML(elem_classes="conversation", elem_id=f"conversation-{c}") for c in self.columns]
            with gr.Column(visible=False) as self.writing:
                self.message = gr.Textbox(
                    placeholder="Your message", lines=1, max_lines=6, max_length=MOST_CHARACTERS, show_label=False,
                    submit_btn="Send", autofocus=True, elem_id="message",
                )  # fmt: skip
                with gr.Row(elem_classes="actions"):
                    self.retry = gr.Button("Another reply", size="sm", elem_id="retry")
                    self.undo = gr.Button("Take back", size="sm", elem_id="undo")
                    self.finish = gr.Button("Finish and rate", size="sm", variant="primary", elem_id="finish")
                self.camera_part = gr.HTML(CAMERA, visible=False)
        with gr.Column(visible=False, elem_classes="survey") as self.rating:
            self.fields = []  # (column, question, its field)
            for question in (self.survey.score, *self.survey.more):
                gr.HTML(bubbles.question_block(question, optional=question in self.survey.more))
                with gr.Row():
                    self.fields += [(i, question, self._field(question, c)) for i, c in enumerate(self.columns)]
            self.store = gr.Checkbox(label="Store this conversation", visible=self.sessions.collection is not None)
            self.what_is_stored = gr.HTML(elem_classes="notice")
            with gr.Row():
                self.rated = gr.Button("Done", variant="primary", elem_id="done")
                self.back = gr.Button("Talk on", elem_id="back")
        with gr.Column(visible=False) as self.done:
            self.result = gr.HTML(elem_classes="notice", elem_id="result")
            self.again = gr.Button("Another conversation", variant="primary", elem_id="again")

    def _field(self, question: str, column: str):
        """The field for the answer to a question of the survey."""
        low, high = QUESTIONS[question].scale
        label = f"{column}: {low} to {high}" if self.sessions.compare else f"{low} to {high}"
        if high <= 10:
            return self.gr.Radio([*range(low, high + 1)], label=label, min_width=300, elem_classes="answer")
        return self.gr.Textbox(label=label, max_length=8, min_width=300, elem_classes="answer")

    # What is to be seen

    def show_conversations(self, session: Session) -> dict:
        """What changes while a reply grows: component -> value."""
        with session.lock:
            reactable, growing = session.phase is Phase.TALKING, session.growing or [None] * len(session.talks)
            return {self.state: state_html(session)} | {
                part: bubbles.conversation(talk, growing[i], i, reactable, title_of(session, i))
                for i, (part, talk) in enumerate(zip(self.shown, session.talks, strict=True))
            }

    def show(self, session: Session | None, window: str) -> dict:
        """The whole page of a session: component -> value or update. None: the session is over."""
        gr, phase = self.gr, session.phase if session else Phase.LEFT
        place = self.sessions.place_in_queue(window) if phase is Phase.WAITING else 0
        parts = {
            self.asking: gr.update(visible=phase is Phase.CONSENT),
            self.talking: gr.update(visible=phase in (Phase.TALKING, Phase.RATING, Phase.DONE)),
            self.writing: gr.update(visible=phase is Phase.TALKING),
            self.rating: gr.update(visible=phase is Phase.RATING),
            self.done: gr.update(visible=phase is Phase.DONE),
            self.timer: gr.Timer(active=phase is Phase.WAITING),
            self.notice: gr.update(
                visible=phase in (Phase.WAITING, Phase.LEFT),
                value=bubbles.text_block(WAIT.format(place=place) if phase is Phase.WAITING else CLOSED),
            ),
        }
        if phase is Phase.LEFT:
            return parts
        turns, free = session.talks[0].turns, session.growing is None
        return parts | self.show_conversations(session) | {
            self.consent_text: bubbles.text_block(session.consent_text),
            self.what_is_stored: bubbles.text_block(session.consent_text),
            self.retry: gr.update(interactive=free and bool(turns) and turns[-1].by_agent),
            self.undo: gr.update(interactive=free and bool(turns)),
            self.finish: gr.update(interactive=session.can_finish),
            self.camera_part: gr.update(visible=session.camera and session.agreed),
            self.result: result_html(session),
        }  # fmt: skip

    # What happens

    def _connect(self) -> None:
        """Connects the events. Every one changes the session, and shows what it has become."""
        gr, sessions = self.gr, self.sessions
        everything = [
            self.state, self.timer, self.notice, self.asking, self.consent_text, self.talking, *self.shown,
            self.writing, self.retry, self.undo, self.finish, self.camera_part, self.rating, self.what_is_stored,
            self.done, self.result,
        ]  # fmt: skip
        settings = {"show_progress": "hidden", "api_visibility": "private"}

        def on(trigger, act, inputs=(), more=()):
            """`act` gets the session and the values of `inputs`; it returns values of `more`, by component, or None."""

            def answer(request: gr.Request, *values):
                session, changes = sessions.find(request.session_hash), None
                try:
                    changes = act(session, *values) if session else None
                except UserError as error:
                    gr.Warning(str(error))
                return self.show(session, request.session_hash) | (changes or {})

            return trigger(answer, [*inputs], [*everything, *more], concurrency_limit=None, **settings)

        def open_session(request: gr.Request):
            session = sessions.open(request.session_hash, self.camera and is_loopback(request.client.host))
            return self.show(session, request.session_hash)

        def close_session(request: gr.Request):
            sessions.leave(request.session_hash)

        def grow(request: gr.Request):
            session = sessions.find(request.session_hash)
            for _ in session.reply() if session else ():
                yield self.show_conversations(session)
            yield self.show(session, request.session_hash)

        self.blocks.load(open_session, None, everything, **settings)
        self.blocks.unload(close_session)
        on(self.timer.tick, lambda session: None)
        on(self.agree.click, lambda session: session.consent(True))
        on(self.decline.click, lambda session: session.consent(False))
        for said in (
            on(self.message.submit, self._say, [self.message], [self.message]),
            on(self.retry.click, Session.retry),
        ):
            said.then(grow, None, everything, concurrency_limit=sessions.people, **settings)
        on(self.undo.click, lambda session: {self.message: session.undo()}, more=[self.message])
        on(self.finish.click, self._finish, more=[self.store])
        on(self.back.click, Session.go_on)
        answers = [field for _, _, field in self.fields]
        on(self.rated.click, self._rate, [self.store, *answers], answers)
        on(self.again.click, Session.begin)

    def _say(self, session: Session, text: str) -> dict:
        session.say(text)
        return {self.message: ""}

    def _finish(self, session: Session) -> dict:
        session.finish()
        return {self.store: session.agreed}

    def _rate(self, session: Session, agreed: bool, *values) -> dict:
        rows = [{} for _ in self.columns]
        for (column, question, _), value in zip(self.fields, values, strict=True):
            if value not in (None, ""):
                rows[column][question] = str(value)
            elif question == self.survey.score:
                raise UserError("please answer the first question")
        session.rate(rows, agreed)
        return dict.fromkeys(field for _, _, field in self.fields)


def state_html(session: Session) -> str:
    """What page.js has to know: the session's key, and whether there is a reply to read."""
    return (
        f'<div id="session" hidden data-key="{session.key}" data-turn="{len(session.talks[0].turns)}" '
        f'data-reading="{str(session.reading).lower()}" data-phase="{session.phase.value}"></div>'
    )


def title_of(session: Session, column: int) -> str:
    """What stands above a column: its letter, and whose it was when the conversation is over."""
    if len(session.talks) == 1:
        return ""
    talk = session.talks[column]
    who = f": {talk.partner.name}{' without its adapter' if talk.base else ''}" if session.phase is Phase.DONE else ""
    return COLUMNS[column] + who


def result_html(session: Session) -> str:
    """What became of the conversation, and links to take it along."""
    if session.phase is not Phase.DONE:
        return ""
    text = "Thank you. " + ("The conversation was stored." if session.agreed else "Nothing was stored.")
    links = "".join(
        f'<a href="/talk/{session.key}/export/{i}" download="talk-{talk.id}.json">Download '
        f"{f'{COLUMNS[i]} ' if len(session.talks) > 1 else 'the conversation '}(JSON)</a> "
        for i, talk in enumerate(session.talks)
    )
    return f"{bubbles.text_block(text)}<p>{links}</p>"
