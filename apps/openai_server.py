"""Requests to a language model on an OpenAI-compatible server, and replies kept on disk as they come in.

Conversations leave this machine with them, so a command that makes them needs `--log_text`.
"""

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from geli.run.console import progress_bar
from geli.run.errors import UserError, first_line

RETRIES, BACKOFF, LONGEST_WAIT = 4, 1.0, 60.0  # seconds; the wait doubles with each retry
FAILURES_IN_A_ROW = 10  # after so many the server is taken to be down

# ---------------------------------------------------------------------------------------------------------------------
# One request


@dataclass(frozen=True)
class Server:
    """Where a language model is.

    Attributes:
        url: up to `/v1`. model: its name there. seed: of its sampling (at temperature 0). timeout: seconds that it may
        be silent. concurrency: requests at a time.
    """

    url: str
    model: str
    seed: int = 0
    timeout: float = 120.0
    concurrency: int = 4

    @property
    def host(self) -> str:
        """Scheme, host and port."""
        return "/".join(self.url.split("/")[:3])


class RequestFailed(Exception):
    """A request that got no reply after all retries. Its message is the kind of failure."""


class ChatClient:
    """Asks a server. Its methods may be called from several threads.

    Args:
        server: where it is. key_name: the environment variable with the API key, which may be unset.

    Attributes:
        client: the connection, a context manager that closes it. stop: set to end the waits between retries.

    Raises:
        UserError: if the address is none, or the API key in the environment cannot be sent.
    """

    def __init__(self, server: Server, key_name: str):
        self.server, self.stop = server, threading.Event()
        self.api_key = os.environ.get(key_name, "").strip()
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UserError(f"{key_name}: expected printable ASCII characters, found others")
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=server.concurrency)
        try:
            self.client = httpx.Client(base_url=server.url, headers=headers, timeout=server.timeout, limits=limits)
        except httpx.InvalidURL as error:
            raise UserError(f"{server.url} is no address of a server: {first_line(error)}") from None

    def request(self, text: str, **more) -> httpx.Response:
        """The server's response to one user message, at temperature 0.

        Args:
            more: other fields of the request, such as `max_tokens`. Servers differ in what `response_format` they take.

        Raises:
            RequestFailed: after the last retry. UserError: if the server refuses the request.
        """
        messages = [{"role": "user", "content": text}]
        body = {"model": self.server.model, "messages": messages, "temperature": 0, "seed": self.server.seed, **more}
        for attempt in range(RETRIES + 1):
            wait = BACKOFF * 2**attempt
            try:
                response = self.client.post("chat/completions", json=body)
            except httpx.TimeoutException:
                failure = "timeout"
            except httpx.RequestError:
                failure = "no connection"
            else:
                if response.is_success:
                    return response
                failure = f"HTTP {response.status_code}"
                if response.status_code != 429 and response.status_code < 500:
                    raise UserError(f"{self.server.host}: {failure}: {self._first_line(response)}")
                wait = max(wait, retry_after(response))
            if attempt == RETRIES or self.stop.wait(min(wait, LONGEST_WAIT)):
                break
        raise RequestFailed(failure)

    def _first_line(self, response: httpx.Response) -> str:
        """The first line of an error page, without the API key, which some servers repeat."""
        text = response.text.strip() or response.reason_phrase
        return (text.replace(self.api_key, "…") if self.api_key else text).splitlines()[0][:300]


def content_of(response: httpx.Response) -> str:
    """The reply in a response; empty if it has none."""
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return ""
    return content if isinstance(content, str) else ""


def retry_after(response: httpx.Response) -> float:
    """Seconds that a server asks to wait: `Retry-After` as a number or a date; 0 without."""
    header = response.headers.get("Retry-After", "0")
    try:
        return float(header)
    except ValueError:
        pass
    try:
        return (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Replies on disk


class ReplyFile:
    """A file of JSON objects, a line each, to which replies are appended as they come in. Several threads may append.

    Args:
        path: of the file, which only its owner can read, because replies may quote conversations.

    Attributes:
        records: `key` of a request -> its object. What is no object with a key, such as the torn last line of a killed
            run, is skipped.
    """

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.Lock()
        self.records = {record["key"]: record for record in _json_objects(path) if "key" in record}

    def append(self, record: dict) -> None:
        """Adds a record, and writes it to the disk before it returns."""
        with self._lock:
            self.path.touch(mode=0o600)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps(record)}")  # begins a line, because a killed run may have left a torn one
                file.flush()
                os.fsync(file.fileno())
            self.records[record["key"]] = record


def _json_objects(path: Path) -> Iterable[dict]:
    """The lines of a file that are JSON objects; none if there is no file."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


# ---------------------------------------------------------------------------------------------------------------------
# Many requests


def ask_all(
    questions: Sequence, ask: Callable, *, concurrency: int, stop: threading.Event, where: str, kept: Path, desc: str
) -> Counter:
    """Calls `ask` with each question, some at a time. Returns how many failed, by kind.

    Args:
        ask: keeps what comes back; raises `RequestFailed`. concurrency: calls at a time. stop: set at the end, so that
            nothing waits any longer.
        where, kept: what is asked, and the file of replies, for the error message. desc: of the progress bar.

    Raises:
        UserError: if `ask` raises one, or `FAILURES_IN_A_ROW` questions failed.
    """
    failures, in_a_row = Counter(), 0

    def failure_of(question) -> str | None:
        try:
            ask(question)
        except RequestFailed as failure:
            return str(failure)
        return None

    with ThreadPoolExecutor(concurrency) as pool:
        waiting = [pool.submit(failure_of, question) for question in questions]
        try:
            for done in progress_bar(as_completed(waiting), total=len(waiting), desc=desc, unit="request"):
                failure = done.result()
                failures += Counter([failure] if failure else [])
                in_a_row = in_a_row + 1 if failure else 0
                if in_a_row == FAILURES_IN_A_ROW:
                    raise UserError(
                        f"{where}: {in_a_row} requests in a row failed ({failure}); answers so far are in {kept}, and "
                        "the same command continues"
                    )
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)  # leaving `with` waits for the requests that are under way
    return failures
