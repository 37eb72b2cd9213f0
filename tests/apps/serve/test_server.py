"""The server: its protocols, its limits, and hostile requests, none of which gets or spoils a score.

GELI_HOSTILE sets how many hostile requests are sent.
"""

import hashlib
import json
import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx2
import pytest
from chat_templates import UNKNOWN, render, tokenizer_of

from apps.serve.server import Limits, RewardServer, read_token
from apps.serve.template import TokenizerTemplate
from apps.sockets import is_loopback
from geli.reward import GELIReward
from geli.run.errors import UserError

SECONDS = 1.0  # in which requests must arrive
LIMITS = Limits(waiting=64, together=16, texts=20, characters=5000, bytes=200_000, seconds=SECONDS)
TOKEN = "a-token-of-some-length"


def hashed(context: str, response: str) -> float:
    """A number that stands for one text alone."""
    return int.from_bytes(hashlib.sha256(f"{context}|{response}".encode()).digest()[:6], "big") / 2**48


class HashedReward(GELIReward):
    """Reads requests as GELIReward does, and scores by `hashed`, when `go` is set. `fail` breaks it."""

    def __init__(self):
        self.head, self.context_turns, self.fail = SimpleNamespace(sequential=False), 4, False
        self.go = threading.Event()
        self.go.set()

    def score_pairs(self, pairs):
        self.go.wait(60)
        if self.fail:
            raise RuntimeError("the model broke")
        return [hashed(prompt.context, response) for prompt, response in pairs]


@pytest.fixture
def served(request):
    """A running server: its reward and a client. The parameter is its token."""
    reward, token = HashedReward(), getattr(request, "param", None)
    server = RewardServer(reward, "127.0.0.1", 0, LIMITS, token)
    thread = threading.Thread(target=server.run)
    thread.start()
    with httpx2.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield SimpleNamespace(reward=reward, client=client, url=server.url)
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


def get_reward(client, *texts: str):
    """A request as OpenRLHF sends it, of (prompt, response) with `|` between."""
    pairs = [text.split("|") for text in texts]
    body = {"query": ["".join(pair) for pair in pairs], "prompts": [pair[0] for pair in pairs], "labels": [None]}
    return client.post("/get_reward", json=body)


def test_openrlhfs_protocol(served):
    answer = get_reward(served.client, "Hello|Hi there User: and", "Good day| Bye</s>")
    rewards = [hashed(" User: Hello", "Hi there"), hashed(" User: Good day", "Bye")]
    assert answer.json() == {"rewards": rewards, "scores": rewards, "extra_logs": {}} and answer.status_code == 200
    older = served.client.post(
        "/get_reward", json={"query": ["<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi"]}
    )
    assert older.json()["rewards"] == [hashed(" User: Hello", "Hi")]


def test_cases_templates_are_read_and_other_markup_is_answered_422(served):
    mistral = get_reward(
        served.client, "<s>[INST] Hello [/INST]| Hi</s>", "<s>[INST] Hello [/INST]|<think>Hm</think>Hi"
    )
    assert mistral.json()["rewards"] == [hashed(" User: Hello", "Hi")] * 2
    unknown = render(UNKNOWN, [{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    pair = {"query": [f"{unknown}Hi<|stop|>"], "prompts": [unknown]}
    refused = served.client.post("/get_reward", json=pair)
    assert refused.status_code == 422 and "found '<|turn|>'" in refused.json()["detail"]
    chat = [[{"role": "user", "content": unknown}, {"role": "assistant", "content": "Hi"}]]
    assert served.client.post("/score", json={"conversations": chat}).status_code == 422
    served.reward.template = TokenizerTemplate(tokenizer_of(UNKNOWN))  # as --tokenizer does
    assert served.client.post("/get_reward", json=pair).json()["rewards"] == [hashed(" User: Hello", "Hi")]


def test_turn_rewards_of_conversations(served):
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    answer = served.client.post("/score", json={"conversations": [chat, [], chat[:1]]})
    expected = [hashed(" User: a", "b"), hashed(" User: a  AI: b", "c")]
    assert answer.json() == {"rewards": [expected, [], []]}


def test_requests_are_scored_together_and_a_full_queue_is_answered_503(served):
    served.reward.go.clear()
    with ThreadPoolExecutor(90) as pool:
        jobs = [pool.submit(get_reward, served.client, f"Hello|{i}") for i in range(90)]
        while not any(job.done() for job in jobs):  # the model has some, 64 wait, and the others are refused
            time.sleep(0.01)
        served.reward.go.set()
        answers = [(i, job.result()) for i, job in enumerate(jobs)]
    refused = [answer for _, answer in answers if answer.status_code == 503]
    assert refused and all(answer.headers["retry-after"] == "1" for answer in refused)
    for i, answer in answers:
        assert answer in refused or answer.json()["rewards"] == [hashed(" User: Hello", str(i))]
    metrics = served.client.get("/metrics").text
    assert f'geli_requests_total{{path="/get_reward",status="503"}} {len(refused):.1f}' in metrics
    batches = float(metrics.partition("geli_batch_texts_count ")[2].split()[0])
    assert 4 < batches < 45 and "geli_waiting_texts 0.0" in metrics  # at most 16 texts are scored at a time


def test_a_model_that_fails_is_an_error_and_no_score(served):
    served.reward.fail = True
    assert get_reward(served.client, "Hello|Hi").status_code == 500
    served.reward.fail = False
    assert get_reward(served.client, "Hello|Hi").json()["rewards"] == [hashed(" User: Hello", "Hi")]
    assert served.client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("served", [TOKEN], indirect=True)
def test_a_token_is_asked_for(served):
    for address, header, status in (
        ("", "", 401), ("", "Bearer wrong", 401), ("?token=wrong", "", 401), ("?token=é", "", 401),
        (f"?token={TOKEN}", "", 200), ("", f"Bearer {TOKEN}", 200), (f"?token={TOKEN}", "Bearer é", 401),
    ):  # fmt: skip
        for path in ("/get_reward", "/score"):
            body = {"query": ["Hello Hi"], "prompts": ["Hello"], "conversations": []}
            headers = {"Authorization": header.encode()} if header else {}
            assert served.client.post(path + address, json=body, headers=headers).status_code == status
    assert served.client.get("/metrics").status_code == 401 and served.client.get("/health").status_code == 200


def test_a_server_that_others_can_reach_needs_a_token(tmp_path):
    with pytest.raises(UserError, match=r"--host 0.0.0.0: other machines could reach the server"):
        RewardServer(HashedReward(), "0.0.0.0", 0)
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "::", "10.0.0.1", "example.org")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    (tmp_path / "short").write_text("secret")
    assert read_token(tmp_path / "token") == TOKEN
    for name in ("short", "missing"):
        with pytest.raises(UserError, match="expected a file with a token of at least 16 characters"):
            read_token(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------------
# Hostile requests, as bytes on a socket


def post(body: bytes, path: str = "/get_reward", length: object = None, extra: str = "") -> bytes:
    """A request; `length` is what it says of its body."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body) if length is None else length}\r\n{extra}\r\n"
    )
    return head.encode() + body


def query(text: object) -> bytes:
    return json.dumps({"query": text, "prompts": text}).encode()


def make_hostile(rng: random.Random) -> tuple[bytes, set[int | None]]:
    """A request, and the statuses that may answer it; None: the connection is closed without an answer."""
    good, path = query(["Hello"]), rng.choice(("/get_reward", "/score"))
    lengths, paths = ("-1", "x", "1e3", "1, 2", "9" * 400), ("/", "/get_reward/x", "/metrics", "/%00", "/" + "a" * 500)
    bodies = (
        b"", b"null", b"[]", b"{}", b"\xff\xfe{}", b"\x00" * 50, good.decode().encode("utf-16"),
        good[: rng.randrange(1, 20)],
        b'{"query": ["\\ud800"]}', b'{"query": ["\xed\xa0\x80"]}', b'{"query": "text"}', b'{"query": [1]}',
        b'{"query": [["a"]]}', b'{"query": [null]}', b'{"query": {"0": "a"}}', b'{"query": ["a"], "prompts": []}',
        b'{"query": ["a"], "prompts": [1]}', b'{"query": ["a"], "prompts": ["b"]}', b"[" * 50_000, b'{"a":' * 10_000,
        b'{"query": [' + b"9" * 10_000 + b"]}", b'{"query": [NaN]}', b'{"conversations": [{"role": "user"}]}',
        b'{"conversations": [[{"role": "root", "content": "a"}]]}', b'{"conversations": [[{"role": "user"}]]}',
        b'{"conversations": [[{"role": {}, "content": "a"}]]}', b"\x1f\x8b" + rng.randbytes(30), rng.randbytes(100),
    )  # fmt: skip
    kinds = {
        "body": (post(rng.choice(bodies), path), {422}),
        "cut": (post(good, path, length=len(good) + rng.randrange(1, 1000)), {None, 400, 408}),
        "short length": (post(good, "/get_reward", length=rng.randrange(1, len(good))), {422}),
        "no number": (post(good, path, length=rng.choice(lengths)), {400, 413, 408, None}),
        "too large": (post(query(["a" * 300_000]), path), {413, None}),
        "too many": (post(query(["a"] * 21)), {413}),
        "too long": (post(query(["a" * 5001])), {413}),
        "path": (post(good, rng.choice(paths)), {404, 405}),
        "method": (rng.choice((b"GET", b"PUT", b"DELETE", b"TRACE")) + b" /score HTTP/1.1\r\nHost: h\r\n\r\n", {405}),
        "not HTTP": (rng.randbytes(rng.randrange(1, 500)) + b"\r\n\r\n", {400, None}),
        "endless head": (b"GET / HTTP/1.1\r\nHost: h\r\n" + b"x: " + b"a" * 100_000, {400, 431, None}),
        "chunks": (b"POST /score HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc", {400, 408, None}),
        "other encoding": (post(good, path, extra="Content-Encoding: gzip\r\nContent-Type: text/xml\r\n"), {200, 422}),
        "nothing": (b"", {None}),
    }  # fmt: skip
    return kinds[rng.choice(list(kinds))]


def send(url: str, content: bytes, drip: float = 0.0, ends: bool = False) -> int | None:
    """The status that answers the bytes, sent at once or (with `drip`) byte by byte with pauses of so many seconds.
    `ends`: nothing more is sent, and the server is told so."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        answer = b""
        try:
            for part in [content] if not drip else [content[i : i + 1] for i in range(len(content))]:
                connection.sendall(part)
                if drip:
                    time.sleep(drip)
            if ends:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                answer += part
                if b"\r\n\r\n" in answer:
                    break
        except OSError:  # closed before all was sent or read
            pass
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else None


def test_hostile_requests_get_no_score_and_spoil_none(served, capfd):
    rng, number = random.Random(0), int(os.environ.get("GELI_HOSTILE", "200"))
    hostile, stop = [make_hostile(rng) for _ in range(number)], threading.Event()

    def client(i: int) -> int:
        """Sends good requests all the while; how many got their score."""
        got = 0
        with httpx2.Client(base_url=served.url, timeout=60, trust_env=False) as own:
            while not stop.is_set() or not got:
                answer = get_reward(own, f"Hello {i}|{got}")
                if answer.status_code != 503:
                    assert answer.json()["rewards"] == [hashed(f" User: Hello {i}", str(got))]
                    got += 1
        return got

    slow = [post(query(["Hello"]))[:40], post(query(["Hello"]))[:-3]] * 4  # a head, and a body, that never end
    with ThreadPoolExecutor(24) as pool:
        clients = [pool.submit(client, i) for i in range(3)]
        dripping = [pool.submit(send, served.url, content, drip=SECONDS / 20) for content in slow]
        found = list(pool.map(lambda request: send(served.url, request[0], ends=None in request[1]), hostile))
        ends = [job.result(60) for job in dripping]
        stop.set()
        assert all(job.result(60) for job in clients)
    for (content, may), status in zip(hostile, found, strict=True):
        assert status in may, content[:200]
    assert set(ends) <= {None, 408}  # closed before they could end
    assert served.client.get("/health").status_code == 200
    assert "Traceback" not in capfd.readouterr().err
