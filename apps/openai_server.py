"""Asks a language model on an OpenAI-compatible server, and keeps replies on disk as they come in.

Conversations leave this machine with the requests, so a command that makes them needs `--log_text`.
"""

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from apps.packages import require
from geli.run.console import progress_bar
from geli.run.errors import UserError, first_line

RETRIES = 4
RETRIED = (408, 409, 429)  # besides 5xx: the HTTP statuses after which `openai` asks again
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
    """Asks a server through `openai`'s client, which repeats failed requests. Several threads may ask.

    Args:
        server: where it is. key_name: the environment variable with the API key, which may be unset.
        requirements: the file that names `openai`, for the error if it is missing.

    Raises:
        UserError: if `openai` is missing, or the address or the API key cannot be used.
    """

    def __init__(self, server: Server, key_name: str, requirements: str):
        self.server = server
        self._openai = openai = require("openai", "asking a server", f"pip install -r {requirements}")
        self._key = os.environ.get(key_name, "").strip() or "no-key"  # servers without keys ignore it
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"{key_name}: expected printable ASCII characters, found others")
        try:
            self._client = openai.OpenAI(
                base_url=server.url, api_key=self._key, timeout=server.timeout, max_retries=RETRIES,
                http_client=openai.DefaultHttpxClient(follow_redirects=False),  # the text is for this host alone
            )  # fmt: skip
        except Exception as error:  # the HTTP library's own, for an address or a proxy's settings in the environment
            raise UserError(f"{server.url}: {first_line(error)}") from None

    def ask(self, text: str, **more) -> tuple[str, Any]:
        """The reply to one user message, at temperature 0, and `openai`'s `CompletionUsage` (None if the server gives
        none).

        Args:
            more: other fields of the request, such as `max_tokens`. Servers differ in what `response_format` they take.

        Raises:
            RequestFailed: after the last retry. UserError: if the server refuses the request.
        """
        messages = [{"role": "user", "content": text}]
        try:
            completion = self._client.chat.completions.create(
                model=self.server.model, messages=messages, temperature=0, seed=self.server.seed, **more
            )
            return str(completion.choices[0].message.content or ""), completion.usage
        except self._openai.APITimeoutError:
            failure = "timeout"
        except self._openai.APIConnectionError:
            failure = "no connection"
        except self._openai.APIStatusError as error:
            failure = f"HTTP {error.status_code}"
            if error.status_code < 500 and error.status_code not in RETRIED:
                raise UserError(f"{self.server.host}: {failure}: {self._first_line(error)}") from None
        except (ValueError, TypeError, AttributeError, IndexError):  # `openai` does not check what a server replies
            failure = "no chat completion"
        raise RequestFailed(failure)

    def _first_line(self, error) -> str:
        """The first line of what a server said, without the API key, which some servers repeat."""
        said = error.body.get("message") if isinstance(error.body, dict) else error.body
        text = str(said or error.response.text).strip() or error.response.reason_phrase
        return text.replace(self._key, "…").partition("\n")[0][:300]


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
        self.path, self.records, self._lock = path, {}, threading.Lock()
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
            with suppress(ValueError, LookupError, TypeError):
                record = json.loads(line)
                self.records[record["key"]] = record

    def append(self, record: dict) -> None:
        """Adds a record, and writes it to the disk before it returns."""
        with self._lock:
            self.path.touch(mode=0o600)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps(record)}")  # begins a line, because a killed run may have left a torn one
                file.flush()
                os.fsync(file.fileno())
            self.records[record["key"]] = record


# ---------------------------------------------------------------------------------------------------------------------
# Many requests


def ask_all(questions: Sequence, ask: Callable, *, concurrency: int, where: str, kept: Path, desc: str) -> Counter:
    """Calls `ask` with each question, some at a time. Returns how many failed, by kind.

    What is under way when it is interrupted is not waited for.

    Args:
        ask: keeps what comes back; raises `RequestFailed`. concurrency: calls at a time.
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

    with ThreadPool(concurrency) as pool:  # whose threads end with the program
        # one at a time in this thread, because a model that computes here must not be cut off while Python ends
        found = pool.imap_unordered(failure_of, questions) if concurrency > 1 else map(failure_of, questions)
        for failure in progress_bar(found, total=len(questions), desc=desc, unit="request"):
            failures += Counter([failure] if failure else [])
            in_a_row = in_a_row + 1 if failure else 0
            if in_a_row == FAILURES_IN_A_ROW:
                raise UserError(
                    f"{where}: {in_a_row} requests in a row failed ({failure}); answers so far are in {kept}, and "
                    "the same command continues"
                )
    return failures
