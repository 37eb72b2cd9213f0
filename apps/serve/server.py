"""Rewards over HTTP: OpenRLHF's remote reward protocol, and turn rewards of conversations.

    POST /get_reward  {"query": [prompt + response], "prompts": [prompt], "labels": [...]}  -> {"rewards": [...], ...}
    POST /score       {"conversations": [[{"role": "user", "content": "Hello"}, ...]]}      -> {"rewards": [[...]]}
    GET  /health      GET /metrics (Prometheus)

Errors have a text in "detail": 401 without the token, 408 for a request that arrives too slowly, 413 for one that is
too large, 422 for one that is not understood, 503 when too much waits.
"""

import asyncio
import hmac
import logging
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from apps.serve.batcher import Batcher, QueueFull
from apps.serve.queries import split_query
from apps.sockets import is_loopback, listen
from geli.data.messages import read_messages
from geli.reward import GELIReward
from geli.run.errors import Stopped, UserError, one_line

CHARACTERS_A_TEXT = 4096  # a text of more counts as several in the queue
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


@dataclass(frozen=True)
class Limits:
    """What the server accepts.

    Attributes:
        waiting: texts that may wait. together: texts of several requests that are scored together.
        texts, characters, bytes: of one request's texts, of one text, of one request's body.
        seconds: in which a request's head, and then its body, must have arrived. connections: at a time.
    """

    waiting: int = 16_384
    together: int = 256
    texts: int = 4096
    characters: int = 200_000
    bytes: int = 2**25
    seconds: float = 20.0
    connections: int = 8192


class RewardRequest(BaseModel, strict=True):
    """The body of OpenRLHF's requests; `prompts` are missing in those of older versions."""

    query: list[str]
    prompts: list[str] | None = None
    labels: Any = None


class ScoreRequest(BaseModel, strict=True):
    """Conversations of chat messages."""

    conversations: list[list[dict[str, Any]]]


class Metrics:
    """What Prometheus reads."""

    def __init__(self):
        self.registry = CollectorRegistry()
        settings = {"registry": self.registry, "namespace": "geli"}
        self.requests = Counter("requests", "Requests that were answered", ["path", "status"], **settings)
        self.seconds = Histogram("request_seconds", "From a request's head to its answer", ["path"], **settings)
        self.batches = Histogram("batch_texts", "Items that were scored together", buckets=BATCH_SIZES, **settings)
        self.waiting = Gauge("waiting_texts", "Texts that wait", **settings)

    @contextmanager
    def request(self, path: str) -> Iterator[None]:
        """Times a request, and counts it by how it was answered."""
        started, status = time.perf_counter(), 500
        try:
            yield
            status = 200
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            self.requests.labels(path, status).inc()
            self.seconds.labels(path).observe(time.perf_counter() - started)


def make_app(reward: GELIReward, batcher: Batcher, limits: Limits, token: str | None, metrics: Metrics) -> FastAPI:
    """The server's application.

    Args:
        token: that requests must bring, as `Authorization: Bearer TOKEN` or in the address as `?token=TOKEN`, because
            OpenRLHF sends no headers of one's own; None: none is needed.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    metrics.waiting.set_function(lambda: batcher.waiting)

    async def scored(run: Callable, items: list, size: int) -> list:
        """The results of `run`, after a place in the queue."""
        if size > limits.waiting:
            raise HTTPException(413, "expected less text in a request: it would never find room in the queue")
        try:
            return await asyncio.wrap_future(batcher.submit(run, items, size))
        except QueueFull:
            raise HTTPException(503, "too many texts wait; try again", headers={"Retry-After": "1"}) from None
        except Exception as error:  # of the model, as when memory does not suffice
            logging.getLogger("uvicorn.error").exception("The reward could not be computed")
            raise HTTPException(500, f"the reward could not be computed ({type(error).__name__})") from None

    @app.post("/get_reward")
    async def get_reward(request: Request) -> Response:
        """OpenRLHF's protocol."""
        with metrics.request("/get_reward"):
            check_token(request, token)
            asked = parse(RewardRequest, await read_body(request, limits))
            check_texts(asked.query, limits)
            prompts = [None] * len(asked.query) if asked.prompts is None else asked.prompts
            if len(prompts) != len(asked.query):
                raise HTTPException(422, f"expected {len(asked.query)} prompts, found {len(prompts)}")
            with named_errors("query"):
                queries = zip(asked.query, prompts, strict=True)
                pairs = [reward.read(*split_query(*query, reward.template)) for query in queries]
            size = sum(1 + len(text) // CHARACTERS_A_TEXT for text in asked.query)
            rewards = await scored(reward.score_pairs, pairs, size)
            return JSONResponse({"rewards": rewards, "scores": rewards, "extra_logs": {}})

    @app.post("/score")
    async def score(request: Request) -> Response:
        """Turn rewards of conversations."""
        with metrics.request("/score"):
            check_token(request, token)
            asked = parse(ScoreRequest, await read_body(request, limits))
            with named_errors("conversation"):
                conversations = list(map(read_messages, asked.conversations))
            texts = [text for turns in conversations for _, text in turns]
            check_texts(texts, limits)
            read = sum(map(len, texts)) * reward.context_turns  # a turn is read again with each of those behind it
            size = len(conversations) + len(texts) + read // CHARACTERS_A_TEXT
            rewards = await scored(reward.score_turns, conversations, size)
            return JSONResponse({"rewards": rewards})

    @app.get("/health")
    async def health() -> Response:
        """Whether rewards are given."""
        alive = batcher.alive
        return JSONResponse({"status": "ok" if alive else "the model has stopped"}, 200 if alive else 503)

    @app.get("/metrics")
    async def read_metrics(request: Request) -> Response:
        """In Prometheus' text format."""
        check_token(request, token)
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def check_token(request: Request, token: str | None) -> None:
    """Answers 401 unless the request has the token, if there is one."""
    header = request.headers.get("authorization", "")
    given = header[7:] if header[:7].lower() == "bearer " else request.query_params.get("token", "")
    if token is not None and not hmac.compare_digest(given.encode("utf-8", "replace"), token.encode()):
        raise HTTPException(401, "expected the server's token", headers={"WWW-Authenticate": "Bearer"})


def check_texts(texts: Sequence[str], limits: Limits) -> None:
    """Answers 413 for too many texts, or one that is too long."""
    if len(texts) > limits.texts:
        raise HTTPException(413, f"expected at most {limits.texts} texts in a request, found {len(texts)}")
    if any(len(text) > limits.characters for text in texts):
        raise HTTPException(413, f"expected at most {limits.characters} characters in a text")


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request; answers 413 if it is too large, and 408 if it does not arrive in time."""
    body, close = bytearray(), {"Connection": "close"}
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.bytes:
                    raise HTTPException(413, f"expected a body of at most {limits.bytes} bytes", headers=close)
    except TimeoutError:
        raise HTTPException(408, f"expected the body within {limits.seconds:g} seconds", headers=close) from None
    except ClientDisconnect:
        raise HTTPException(400, "the body was cut") from None
    return bytes(body)


def parse(kind: type[BaseModel], body: bytes) -> Any:
    """A body as the request that it is to be; answers 422, without quoting the body, if it is none."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "body"
        raise HTTPException(422, f"{place[:80]}: {first['msg'][:200]}") from None


@contextmanager
def named_errors(what: str) -> Iterator[None]:
    """Answers 422 for a text or a conversation that is not understood."""
    try:
        yield
    except UserError as error:
        raise HTTPException(422, f"{what}: {error}") from None


class ImpatientProtocol(H11Protocol):
    """Closes a connection on which a request's head does not arrive in time, which uvicorn waits for without end."""

    seconds = Limits.seconds
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        """Called by asyncio."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait()
        else:
            self._arrived()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._arrived()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._deadline = self._deadline or self.loop.call_later(self.seconds, self.transport.close)

    def _arrived(self) -> None:
        if self._deadline:
            self._deadline.cancel()
        self._deadline = None


class RewardServer(uvicorn.Server):
    """The server, which listens from the beginning: `run` answers those that have connected before.

    Args:
        reward: what gives rewards. host, port: where it listens; port 0 is a free one. limits, token: see `make_app`.

    Attributes:
        url: its address.

    Raises:
        UserError: if it cannot listen there, or has no token although other machines can reach it.
    """

    def __init__(self, reward: GELIReward, host: str, port: int, limits: Limits = Limits(), token: str | None = None):
        if token is None and not is_loopback(host):
            raise UserError(f"--host {host}: other machines could reach the server: give it a --token_file")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * limits.connections)), hard))
        metrics = Metrics()
        self._socket = listen(host, port, backlog=min(limits.connections, 2048))
        self._batcher = Batcher(limits.waiting, limits.together, metrics.batches.observe)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self._socket.getsockname()[1]}"
        protocol = type("Protocol", (ImpatientProtocol,), {"seconds": limits.seconds})
        config = uvicorn.Config(
            make_app(reward, self._batcher, limits, token, metrics), http=protocol, ws="none", lifespan="off",
            log_level="error", access_log=False, server_header=False, limit_concurrency=limits.connections,
            timeout_keep_alive=30, timeout_graceful_shutdown=600,
        )  # fmt: skip
        super().__init__(config)

    def run(self) -> None:
        """Answers requests until a signal comes; then those that are accepted, and ends."""
        if threading.current_thread() is threading.main_thread():
            for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
                signal.signal(number, lambda *_, code=code: stop(code))  # uvicorn raises the signal again at its end
        try:
            super().run(sockets=[self._socket])
        finally:
            self._batcher.close()


def stop(code: int) -> None:
    """Ends the process after the last answer."""
    raise Stopped("stopped; every request that was accepted is answered", code)


def read_token(path: Path) -> str:
    """The token in a file.

    Raises:
        UserError: if there is none of at least 16 characters.
    """
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError):
        token = ""
    if len(token) < 16 or not token.isprintable() or " " in token:
        raise UserError(
            one_line(f"--token_file {path}: expected a file with a token of at least 16 characters; make one with "
            "python -c 'import secrets; print(secrets.token_urlsafe())' > FILE")
        )  # fmt: skip
    return token
