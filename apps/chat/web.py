"""The server of the page: who may open it, and its start and end."""

import secrets
import socket
from collections.abc import Callable
from urllib.parse import parse_qs

from apps.chat.bubbles import REACTIONS
from apps.chat.camera import Camera
from apps.chat.collect import talk_record
from apps.chat.page import SCRIPT, STYLE, Page, Survey
from apps.chat.sessions import Phase, Sessions
from apps.chat.terminal import hang_ups_end_normally
from apps.packages import install, require
from apps.sockets import is_loopback
from geli.run.errors import UserError

# nothing is loaded from, or sent to, another server; Gradio needs scripts and styles in the page
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


class Door:
    """Lets in who has the token, and forbids the page to load anything from elsewhere.

    The token comes in the link once, and then as a cookie.

    Args:
        app: the ASGI application behind it. token: None: everybody may come in. cookie: its name.
    """

    def __init__(self, app: Callable, token: str | None, cookie: str):
        self.app, self.token, self.cookie = app, token, cookie

    async def __call__(self, scope, receive, send) -> None:
        """Answers a request, or hands it on."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        if self.token and self._is_token(parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[-1]):
            cookie = f"{self.cookie}={self.token}; HttpOnly; SameSite=Lax; Path=/"
            return await answer(send, 303, {"location": "/", "set-cookie": cookie})
        if self.token and not self._is_token(self._cookie_of(scope)):
            return await answer(send, 403, {}, b"This page needs the whole link, with its token.")

        async def send_with_policy(message) -> None:
            if message["type"] == "http.response.start":
                headers = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            await send(message)

        await self.app(scope, receive, send_with_policy)

    def _is_token(self, text: str) -> bool:
        return secrets.compare_digest(text.encode(), self.token.encode())

    def _cookie_of(self, scope) -> str:
        header = b";".join(value for name, value in scope["headers"] if name == b"cookie").decode("latin-1")
        pairs = (part.strip().partition("=") for part in header.split(";"))
        return next((value for name, _, value in pairs if name == self.cookie), "")


async def answer(send, status: int, headers: dict[str, str], body: bytes = b"") -> None:
    """Sends a short ASGI response."""
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def make_app(sessions: Sessions, survey: Survey, camera: Camera | None):
    """The FastAPI application: the page at `/`, and at `/talk/KEY/` what its script asks for.

    Raises:
        UserError: if gradio is not installed.
    """
    gr, fastapi = (require(package, "--web", install("chat")) for package in ("gradio", "fastapi"))
    app = fastapi.FastAPI(openapi_url=None)

    def session_of(key: str):
        session = sessions.by_key(key)
        if session is None:
            raise fastapi.HTTPException(404)
        return session

    @app.exception_handler(UserError)
    async def refuse(_, error: UserError):
        return fastapi.Response(str(error), 409)

    @app.post("/talk/{key}/writing")
    def writing(key: str) -> None:
        session_of(key).writes()

    @app.post("/talk/{key}/react/{column}/{face}")
    def react(key: str, column: int, face: str) -> None:
        session = session_of(key)
        if face not in REACTIONS or not 0 <= column < len(session.talks):
            raise fastapi.HTTPException(404)
        session.react(column, face)

    @app.get("/talk/{key}/export/{column}")
    def export(key: str, column: int):
        session = session_of(key)
        if session.phase is not Phase.DONE or not 0 <= column < len(session.talks):
            raise fastapi.HTTPException(404)
        return fastapi.Response(talk_record(session.talks[column]), media_type="application/json")

    @app.post("/talk/{key}/frame/{width}")
    async def frame(key: str, width: int, request: fastapi.Request) -> None:
        session = session_of(key)
        if not (session.camera and session.agreed and is_loopback(request.client.host)):
            raise fastapi.HTTPException(403)
        pixels = await camera.receive(request.stream(), width)
        await require("starlette.concurrency", "--web", install("chat")).run_in_threadpool(camera.look, session, pixels)

    return gr.mount_gradio_app(
        app, Page(gr, sessions, survey, camera is not None).blocks, "/",
        footer_links=[], app_kwargs={"openapi_url": None},
        theme=gr.themes.Default(primary_hue="blue", font="system-ui", font_mono="monospace"),  # not from the web
        css=STYLE.read_text(encoding="utf-8"), head=f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>",
    )  # fmt: skip


def serve(sessions: Sessions, survey: Survey, camera: Camera | None, host: str, listener: socket.socket) -> None:
    """Serves the page until Ctrl-C or SIGTERM; then what is open is stored as broken off, if its people agreed.

    Args:
        host: if it is not this machine's own address, the link has a token, without which the page cannot be opened.
        listener: at this host.

    Raises:
        UserError: if a package is missing.
    """
    uvicorn, port = require("uvicorn", "--web", install("chat")), listener.getsockname()[1]
    token = token_for(host)
    door = Door(make_app(sessions, survey, camera), token, f"geli-{port}")
    config = uvicorn.Config(door, log_level="critical", access_log=False, timeout_graceful_shutdown=1)
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    print(f"Open http://{shown}:{port}/{f'?token={token}' if token else ''} (Ctrl-C ends it)", flush=True)
    with hang_ups_end_normally():
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            print()
        finally:
            sessions.close()


def token_for(host: str) -> str | None:
    """A new token, or None if only this machine reaches the address."""
    return None if is_loopback(host) else secrets.token_urlsafe(16)
