"""The page on which people talk: Gradio's components, and what happens on their events."""

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import ModuleType

from geli.data.candor import MOST_CHARACTERS
from geli.people import bubbles
from geli.people.sessions import COLUMNS, Phase, Session, Sessions
from geli.people.survey import answer_range
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
CLOSED = "This conversation was closed, because the page was left or nothing was said for a long time. Reload the page."


@dataclass(frozen=True)
class Survey:
    """What people are asked at the end: `score` must be answered, `more` need not."""

    score: str
    more: Sequence[str] = ()


def is_local(host: str | None) -> bool:
    """Whether a request's sender is on this machine."""
    try:
        return ip_address(host or "").is_loopback
    except ValueError:
        return False


def make_page(gr: ModuleType, sessions: Sessions, survey: Survey, camera: bool):
    """The page, a `gradio.Blocks`.

    Args:
        gr: the module gradio. camera: whether the camera is offered to people who sit at this machine.
    """
    columns = COLUMNS[: 1 + sessions.compare]
    names = {column: f"{column}: " if sessions.compare else "" for column in columns}
    with gr.Blocks(title="Talk", analytics_enabled=False) as page:
        state = gr.HTML(elem_id="state")
        notice = gr.HTML(visible=False, elem_classes="notice")
        with gr.Column(visible=False) as asking:
            consent_text = gr.HTML(elem_classes="notice")
            with gr.Row():
                agree = gr.Button("I agree", variant="primary", elem_id="agree")
                decline = gr.Button("Talk without storing", elem_id="decline")
        with gr.Column(visible=False) as talking:
            with gr.Row(elem_classes="columns"):
                shown = [gr.HTML(elem_classes="conversation", elem_id=f"conversation-{column}") for column in columns]
            with gr.Column(visible=False) as writing:
                message = gr.Textbox(
                    placeholder="Your message", lines=1, max_lines=6, max_length=MOST_CHARACTERS, show_label=False,
                    submit_btn="Send", autofocus=True, elem_id="message",
                )  # fmt: skip
                with gr.Row(elem_classes="actions"):
                    retry = gr.Button("Another reply", size="sm", elem_id="retry")
                    undo = gr.Button("Take back", size="sm", elem_id="undo")
                    finish = gr.Button("Finish and rate", size="sm", variant="primary", elem_id="finish")
                camera_part = gr.HTML(CAMERA, visible=False)
        with gr.Column(visible=False, elem_classes="survey", elem_id="survey") as rating:
            fields = []
            for question in (survey.score, *survey.more):
                gr.HTML(bubbles.question_block(question, optional=question in survey.more))
                with gr.Row():
                    fields += [(column, question, answer_field(gr, question, names[column])) for column in columns]
            store = gr.Checkbox(label="Store this conversation", visible=sessions.collection is not None)
            what_is_stored = gr.HTML(elem_classes="notice")
            with gr.Row():
                send = gr.Button("Done", variant="primary", elem_id="done")
                back = gr.Button("Talk on", elem_id="back")
        with gr.Column(visible=False) as done:
            result = gr.HTML(elem_classes="notice", elem_id="result")
            again = gr.Button("Another conversation", variant="primary", elem_id="again")
        timer = gr.Timer(2, active=False)
        answers = [field for _, _, field in fields]

        def conversations(session: Session) -> dict:
            """What changes while a reply grows."""
            return {state: state_html(session)} | {
                part: bubbles.conversation(
                    talk, session.growing and session.growing[i], i, session.phase is Phase.TALKING,
                    title_of(session, i),
                )
                for i, (part, talk) in enumerate(zip(shown, session.talks, strict=True))
            }  # fmt: skip

        def whole(session: Session | None, window: str) -> dict:
            """What is to be seen, from what the session is at."""
            phase = session.phase if session else Phase.LEFT
            parts = {
                asking: gr.update(visible=phase is Phase.CONSENT),
                talking: gr.update(visible=phase in (Phase.TALKING, Phase.RATING, Phase.DONE)),
                writing: gr.update(visible=phase is Phase.TALKING),
                rating: gr.update(visible=phase is Phase.RATING),
                done: gr.update(visible=phase is Phase.DONE),
                timer: gr.Timer(active=phase is Phase.WAITING),
                notice: gr.update(visible=phase in (Phase.WAITING, Phase.LEFT), value=bubbles.text_block(CLOSED)),
            }
            if phase is Phase.WAITING:
                place = sessions.place_in_queue(window)
                text = f"All places are taken. You are number {place} in the queue; this page goes on by itself."
                parts[notice] = gr.update(visible=True, value=bubbles.text_block(text))
            if session and phase is not Phase.LEFT:
                free = session.growing is None
                parts |= conversations(session) | {
                    consent_text: bubbles.text_block(session.consent_text),
                    what_is_stored: bubbles.text_block(session.consent_text),
                    retry: gr.update(interactive=free and bool(session.talks[0].replies)),
                    undo: gr.update(interactive=free and bool(session.talks[0].turns)),
                    finish: gr.update(interactive=session.can_finish),
                    camera_part: gr.update(visible=session.camera and session.agreed),
                    result: result_html(session),
                }
            return parts

        everything = [
            state, notice, asking, consent_text, talking, *shown, writing, retry, undo, finish, camera_part,
            rating, what_is_stored, done, result, timer,
        ]  # fmt: skip

        def on(trigger, act, inputs=(), more=()):
            """Lets `act` (session, inputs) change the session on an event, and shows what it has become.

            Args:
                more: further components that `act` returns updates of.
            """

            def react(request: gr.Request, *values):
                session, changes = sessions.find(request.session_hash), None
                try:
                    changes = act(session, *values) if session else None
                except UserError as error:
                    gr.Warning(str(error))
                return whole(session, request.session_hash) | (changes or {})

            return trigger(
                react, list(inputs), [*everything, *more], show_progress="hidden", concurrency_limit=None,
                api_visibility="private",
            )  # fmt: skip

        def open_session(request: gr.Request):
            session = sessions.open(request.session_hash, camera and is_local(request.client.host))
            return whole(session, request.session_hash)

        def close_session(request: gr.Request):
            sessions.leave(request.session_hash)

        def grow(request: gr.Request):
            session = sessions.find(request.session_hash)
            for _ in session.reply() if session else ():
                yield conversations(session)
            yield whole(session, request.session_hash)

        def reply_after(event):
            event.then(
                grow, None, everything, show_progress="hidden", api_visibility="private",
                concurrency_limit=sessions.people,
            )  # fmt: skip

        def say(session: Session, text: str) -> dict:
            session.say(text)
            return {message: ""}

        def rate(session: Session, agreed: bool, *values) -> dict:
            rows = {column: {} for column in columns}
            for (column, question, _), value in zip(fields, values, strict=True):
                if value not in (None, ""):
                    rows[column][question] = str(value)
                elif question == survey.score:
                    raise UserError("please answer the first question")
            session.rate([*rows.values()], agreed)
            return dict.fromkeys(answers)

        page.load(open_session, None, everything, show_progress="hidden", api_visibility="private")
        page.unload(close_session)
        on(timer.tick, lambda session: None)
        on(agree.click, lambda session: session.consent(True))
        on(decline.click, lambda session: session.consent(False))
        reply_after(on(message.submit, say, [message], [message]))
        reply_after(on(retry.click, Session.retry))
        on(undo.click, lambda session: {message: session.undo()}, more=[message])
        on(finish.click, lambda session: {store: finished(session)}, more=[store])
        on(back.click, Session.go_on)
        on(send.click, rate, [store, *answers], answers)
        on(again.click, Session.begin)
    return page


def finished(session: Session) -> bool:
    """Asks for ratings; returns whether the person has agreed to storing."""
    session.finish()
    return session.agreed


def answer_field(gr: ModuleType, question: str, name: str):
    """The field for the answer to a question of the survey."""
    low, high = answer_range(question)
    if high <= 10:
        return gr.Radio([*range(low, high + 1)], label=f"{name}{low} to {high}", min_width=300, elem_classes="answer")
    return gr.Textbox(label=f"{name}{low} to {high}", max_length=8, min_width=300, elem_classes="answer")


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
