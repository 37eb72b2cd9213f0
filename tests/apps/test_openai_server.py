"""What a server's responses and failures come to, without a server."""

import sys
import threading
from functools import partial

import httpx2
import pytest

openai = pytest.importorskip("openai", reason="needs openai (apps/judge/requirements.txt)")

from apps.openai_server import FAILURES_IN_A_ROW, RETRIES, ChatClient, RequestFailed, Server, ask_all
from geli.run.errors import UserError

ASKING = {"where": "http://h", "kept": "answers.jsonl", "desc": "asking"}


@pytest.fixture
def client_of(monkeypatch):
    """Makes a client whose requests a function answers; returns it and the list of these requests."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0)

    def make(respond, key="sk-secret"):
        requests = []
        transport = httpx2.MockTransport(lambda request: requests.append(request) or respond(request))
        monkeypatch.setattr(openai, "DefaultHttpxClient", partial(httpx2.Client, transport=transport))
        monkeypatch.setenv("A_KEY", key)
        return ChatClient(Server("http://h/v1", "m"), "A_KEY", "some/requirements.txt"), requests

    return make


def always(status: int, **content):
    return lambda _: httpx2.Response(status, **content)


def test_a_reply_has_its_text_and_the_tokens_that_the_server_counted(client_of):
    reply = {"choices": [{"message": {"content": "hello"}}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
    client, requests = client_of(always(200, json=reply))
    text, usage = client.ask("hi")
    assert (text, usage.prompt_tokens, usage.completion_tokens) == ("hello", 3, 1)
    assert requests[0].url == "http://h/v1/chat/completions"
    assert requests[0].headers["Authorization"] == "Bearer sk-secret"
    client, requests = client_of(always(200, json={"choices": [{"message": {"content": None}}]}), key="")
    assert client.ask("hi") == ("", None) and len(requests) == 1  # and a server that needs no key


@pytest.mark.parametrize("body", ["", "<html>", "{}", "[]", '{"choices": []}', '{"choices": [{"message": null}]}'])
@pytest.mark.parametrize("kind", ["text/html", "application/json"])
def test_a_response_that_is_no_chat_is_a_failure(client_of, body, kind):
    client, requests = client_of(always(200, text=body, headers={"Content-Type": kind}))
    with pytest.raises(RequestFailed, match="no chat completion"):
        client.ask("hi")
    assert len(requests) == 1


def fails(error: type):
    def respond(request):
        raise error("sk-secret", request=request)

    return respond


@pytest.mark.parametrize(
    ("respond", "kind"),
    [
        *((always(status, text="busy"), f"HTTP {status}") for status in (408, 409, 429, 500, 503)),
        (fails(httpx2.ReadTimeout), "timeout"),
        (fails(httpx2.ConnectError), "no connection"),
        (fails(httpx2.RemoteProtocolError), "no connection"),
    ],
)
def test_what_may_pass_is_asked_again_before_it_is_a_failure(client_of, respond, kind):
    client, requests = client_of(respond)
    with pytest.raises(RequestFailed, match=f"^{kind}$"):
        client.ask("hi")
    assert len(requests) == RETRIES + 1


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (401, {"text": "\nno sk-secret\nmore"}, "no …"),
        (400, {"json": {"error": {"message": "sk-secret\nis too long"}}}, "…"),
        (404, {"json": {"error": "no model m"}}, "no model m"),
        (422, {"json": {"detail": 7}}, '{"detail":7}'),
        (403, {}, "Forbidden"),
        (499, {}, ""),
        (307, {"headers": {"Location": "http://elsewhere/v1"}}, "Temporary Redirect"),  # text goes to one host alone
    ],
)
def test_a_refusal_ends_at_once_with_the_servers_first_line(client_of, status, content, said):
    client, requests = client_of(always(status, **content))
    with pytest.raises(UserError) as error:
        client.ask("hi")
    assert str(error.value) == f"http://h: HTTP {status}: {said}" and len(requests) == 1


def test_what_no_request_can_be_made_with_is_refused_without_showing_the_key(monkeypatch):
    with pytest.raises(UserError, match=r"http://999\.1\.1\.1/v1: Invalid IPv4 address"):
        ChatClient(Server("http://999.1.1.1/v1", "m"), "A_KEY", "some/requirements.txt")
    monkeypatch.setenv("A_KEY", "sécret")
    with pytest.raises(UserError) as error:
        ChatClient(Server("http://h/v1", "m"), "A_KEY", "some/requirements.txt")
    assert "A_KEY" in str(error.value) and "cret" not in str(error.value)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"missing .*openai.*: pip install -r some/requirements.txt"):
        ChatClient(Server("http://h/v1", "m"), "A_KEY", "some/requirements.txt")


@pytest.mark.parametrize("concurrency", [1, 3])
def test_failures_are_counted_by_kind_until_ten_in_a_row(concurrency):
    def ask(question):
        if question:
            raise RequestFailed(question)

    some = [*["timeout"] * (FAILURES_IN_A_ROW - 1), None, None, None, "HTTP 500"]
    counts = {"timeout": FAILURES_IN_A_ROW - 1, "HTTP 500": 1}
    assert ask_all(some, ask, concurrency=concurrency, **ASKING) == counts
    with pytest.raises(
        UserError, match=r"10 requests in a row failed \(timeout\); answers so far are in answers.jsonl"
    ):
        ask_all(["timeout"] * FAILURES_IN_A_ROW, ask, concurrency=concurrency, **ASKING)


def test_what_is_under_way_is_not_waited_for_after_an_error():
    release, finished = threading.Event(), []

    def ask(question):
        if question == "refused":
            raise UserError("refused")
        release.wait(5)
        finished.append(question)

    with pytest.raises(UserError, match="refused"):
        ask_all(["slow", "refused"], ask, concurrency=2, **ASKING)
    assert not finished
    release.set()
