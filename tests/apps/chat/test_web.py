"""The server of the page: who gets in, what its script may ask for, and pictures that are read and forgotten."""

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from starlette.testclient import TestClient
from talks import LetterPolicy

from apps.chat import camera as camera_module
from apps.chat import web
from apps.chat.camera import LARGEST, Camera
from apps.chat.collect import Collection
from apps.chat.page import Survey
from apps.chat.partner import Partner
from apps.chat.sessions import Phase, Sessions
from apps.chat.talk import Talk
from apps.faces import FaceModel
from apps.sockets import is_loopback, listen
from geli.run.errors import UserError

BRIGHT = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


async def hello(scope, receive, send) -> None:
    await web.answer(send, 200, {"x-app": "yes"}, b"hello")


def ask(door, query: str = "", cookie: str = "", kind: str = "http") -> tuple[int, dict[str, str]]:
    """The status and the headers with which a `Door` answers."""
    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"cookie", cookie.encode())] if cookie else []
    scope = {"type": kind, "query_string": query.encode(), "headers": headers}
    with ThreadPoolExecutor(1) as thread:  # this one may have a browser's event loop
        thread.submit(asyncio.run, door(scope, None, send)).result()
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


# ---------------------------------------------------------------------------------------------------------------------
# Who gets in


def test_a_link_with_the_token_becomes_a_cookie_and_nothing_else_opens_the_door():
    door = web.Door(hello, "secret", "geli-1")
    status, headers = ask(door, "token=secret")
    assert (status, headers["location"]) == (303, "/")
    assert headers["set-cookie"] == "geli-1=secret; HttpOnly; SameSite=Lax; Path=/"
    assert ask(door, cookie='a=b; c@d="é; geli-1=secret')[1]["x-app"] == "yes"
    for query, cookie in (("", ""), ("token=", ""), ("token=secre", ""), ("token=é", ""), ("", "geli-1=x"), ("", "=;")):
        for kind in ("http", "websocket"):
            status, headers = ask(door, query, cookie, kind)
            assert status == 403 and "x-app" not in headers


def test_at_this_machine_no_token_is_needed_and_the_page_loads_nothing_from_elsewhere():
    status, headers = ask(web.Door(hello, None, "geli-1"))
    assert status == 200 and headers["content-security-policy"].startswith("default-src 'self' ")
    assert "http" not in headers["content-security-policy"] and headers["referrer-policy"] == "no-referrer"


def test_loopback_addresses_are_local():
    assert all(map(is_loopback, ("127.0.0.1", "127.3.2.1", "::1")))
    assert not any(map(is_loopback, ("192.168.0.1", "8.8.8.8", "::2", "testclient", "", None)))
    assert not any(map(web.token_for, ("127.0.0.1", "localhost", "::1")))
    assert len({web.token_for(host) for host in ("0.0.0.0", "::", "192.168.0.1", "my-machine")}) == 4


def test_a_port_that_is_taken_is_named():
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=rf"--host 127.0.0.1 --port {port}: Address already in use.*; name another"):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match="--host no-such-host"):
        listen("no-such-host.invalid", 0)
    with pytest.raises(UserError, match="--port 70000"):
        listen("127.0.0.1", 70000)
    assert isinstance(listener, socket.socket)


# ---------------------------------------------------------------------------------------------------------------------
# What the page's script asks for


@pytest.fixture
def served(tmp_path, monkeypatch):
    """(client of this machine, client of another, session, collection) of a person who agreed, after a reply."""
    bright = FaceModel(lambda: lambda frame: np.array(BRIGHT) if frame.mean() > 50 else None, "bright is happy")
    monkeypatch.setitem(camera_module.FACE_MODELS, "bright", bright)
    collection = Collection(tmp_path / "talks")
    partner = Partner(LetterPolicy("Hello|"), "it", tuned=True)
    sessions = Sessions(partial(Talk, partner, None), False, collection, 1)
    app = web.make_app(sessions, Survey("overall_affect", ("i_like_you",)), Camera("bright"))
    session = sessions.open("window", camera=True)
    session.consent(True)
    session.say("Hi")
    assert len([*session.reply()]) > 3
    clients = (TestClient(app, client=(host, 1)) for host in ("127.0.0.1", "192.168.0.9"))
    return *clients, session, collection


def test_a_picture_becomes_a_face_and_other_bytes_and_machines_are_refused(served):
    near, far, session, _ = served
    (talk,), address = session.talks, f"/talk/{session.key}/frame"
    picture = np.full((3, 2, 4), 200, dtype=np.uint8).tobytes()  # two pixels wide, three high
    assert near.post(f"{address}/2", content=picture).status_code == 200
    assert [*talk.frames.values()] == [BRIGHT] and talk.notes == {"camera": "bright"}
    assert near.post(f"{address}/2", content=bytes(24)).status_code == 200
    assert [*talk.frames.values()][-1] is None  # nobody is seen
    before = dict(talk.frames)
    too_many = bytes(4 * LARGEST * (LARGEST + 1))
    for width, content in (("2", b""), ("2", bytes(23)), ("0", picture), ("641", bytes(4 * 641)), ("640", too_many)):
        answer = near.post(f"{address}/{width}", content=content)
        assert answer.status_code == 409 and answer.text == "expected a picture of at most 640 x 640 pixels"
    assert near.post(f"{address}/x", content=picture).status_code == 422
    assert far.post(f"{address}/2", content=picture).status_code == 403
    assert near.post(f"/talk/{'A' * 32}/frame/2", content=picture).status_code == 404
    session.agreed = False
    assert near.post(f"{address}/2", content=picture).status_code == 403 and talk.frames == before


def test_writing_reacting_and_exporting(served):
    near, _, session, collection = served
    (talk,), address = session.talks, f"/talk/{session.key}"
    assert near.post(f"{address}/react/0/happiness").status_code == 200 and talk.turns[-1].reaction == "happiness"
    assert near.post(f"{address}/react/0/anger").status_code == 404
    assert near.post(f"{address}/react/1/happiness").status_code == 404
    assert near.get(f"{address}/export/0").status_code == 404  # it goes on
    assert near.post(f"{address}/writing").status_code == 200 and talk._writing is not None
    session.finish()
    session.rate([{"overall_affect": "7"}], agreed=True)
    exported = near.get(f"{address}/export/0").json()
    assert exported["id"] == talk.id and exported["answers"] == {"overall_affect": 7}
    assert [turn["text"] for turn in exported["turns"]] == ["Hi", "Hello"] and session.phase is Phase.DONE
    assert near.get(f"{address}/export/1").status_code == 404
    (stored,) = (path for path in collection.folder.iterdir() if not path.name.startswith("."))
    assert {path.suffix for path in stored.rglob("*") if path.is_file()} == {".csv", ".json"}  # no picture
    assert near.get("/").status_code == 200 and near.get("/openapi.json").status_code == 404
    assert near.get("/gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}
