"""The page of apps/chat in a real browser: talking, rating, exporting; several people; the camera."""

import csv
import importlib.util
import json
import re
import signal
import subprocess
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from conftest import environment_of_its_own, program, small_model
from small_models import write_head
from talks import HEADS, write_checkpoint

from geli.data.candor import FACES

pytestmark = pytest.mark.slow

EVIL = "<img src=x onerror=\"document.title='broken'\"> ${1+1} {{value}} </p><script>document.title='broken'</script>"


@pytest.fixture(scope="module")
def made(sample, tmp_path_factory):
    """Small models, a reward head and a checkpoint that was trained with it."""
    out = tmp_path_factory.mktemp("made")
    encoder, policy = (small_model(kind, out / kind, sample) for kind in ("bart", "llama"))
    head = write_head(out / HEADS, encoder)
    return SimpleNamespace(out=out, encoder=encoder, policy=policy, weights=write_checkpoint(out, policy, head))


@pytest.fixture(scope="module")
def server(made, tmp_path_factory):
    """The page with all that it can do. Ends it by SIGTERM, which stores what is open."""
    folder = tmp_path_factory.mktemp("server")
    talks, (temporary, cwd) = folder / "talks", (folder / name for name in ("tmp", "cwd"))
    for path in (temporary, cwd):
        path.mkdir()
    has_faces = all(map(importlib.util.find_spec, ("fer", "cv2", "ai_edge_litert")))
    command = [*program("apps.chat"), "--weights", made.weights, "--output_dir", made.out, "--web"]
    command += ["--port", 0, "--compare", "--collect", talks, "--people", 2, "--questions", "i_like_you", "--seed", 1]
    process = subprocess.Popen(
        [*map(str, command), *(["--camera"] if has_faces else [])], cwd=cwd, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=environment_of_its_own(TMPDIR=str(temporary)),
    )  # fmt: skip
    try:
        url = re.search(r"Open (\S+)", wait_for(process, "Open "))[1]
        yield SimpleNamespace(url=url, process=process, talks=talks, folder=folder)
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=120)[0]
        assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in printed
        assert not [path for path in (*temporary.rglob("*"), *cwd.rglob("*")) if path.is_file()]  # none of Gradio's
    finally:
        process.kill()
        process.communicate()


def wait_for(process, text: str) -> str:
    """Reads a program's output up to the line with `text`; returns it."""
    printed = ""
    while text not in printed:
        line = process.stdout.readline()
        assert line, printed
        printed += line
    return printed


class Person:
    """Somebody with the page open in a browser of their own.

    Attributes:
        requests: what the browser asked for: (method, address). wrong: what went wrong on the page.
    """

    def __init__(self, browser, url: str, agree: bool | None = True, script: str = ""):
        self.page, self.requests, self.wrong = browser.new_page(), [], []
        self.page.set_viewport_size({"width": 1400, "height": 900})
        self.page.set_default_timeout(60_000)
        self.page.add_init_script(script)
        self.page.on("request", lambda request: self.requests.append((request.method, request.url)))
        self.page.on("console", lambda message: self.wrong.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.goto(url)
        if agree is not None:
            self.page.locator("#agree" if agree else "#decline").click()
            self.page.locator("#message textarea").wait_for()

    def begin_to_say(self, text: str) -> None:
        """Sends a message."""
        self.page.locator("#message textarea").fill(text)
        self.page.locator("#message textarea").press("Enter")

    def wait_for_replies(self, count: int, whole: bool = True) -> None:
        """Waits until there are so many whole replies, and (`whole`) until none is being made."""
        self.page.wait_for_function(
            f"document.querySelectorAll('.turn.agent:not(.growing)').length === {count}"
            + whole * " && !document.querySelector('#finish').disabled"
        )

    def say(self, text: str, replies: int) -> None:
        """Sends a message, and waits until there are so many whole replies on the page."""
        self.begin_to_say(text)
        self.wait_for_replies(replies)

    def texts(self, selector: str) -> list[str]:
        """What the elements of the page say."""
        return self.page.locator(selector).all_text_contents()

    def rate(self, *answers: int) -> None:
        """Finishes, and answers the questions."""
        self.page.locator("#finish").click()
        self.page.locator("#done").wait_for()
        for field, answer in zip(self.page.locator(".block.answer").all(), answers, strict=True):
            field.get_by_label(str(answer), exact=True).check()
        self.page.locator("#done").click()
        self.page.locator("#again").wait_for()

    def went_elsewhere(self, url: str) -> list[str]:
        """Requests to other servers than that of the page."""
        own = {urlsplit(url).netloc, ""}
        return [address for _, address in self.requests if urlsplit(address).netloc not in own]


def rows_of(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def utterances(folder) -> list[str]:
    return [row["utterance"] for row in rows_of(folder / "transcription" / "transcript_cliffhanger.csv")]


def conversations_in(folder) -> list:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


# What the page showed whenever it changed: for each column the length of the growing reply, and the number of bars.
WATCH = """() => {
  window.seen = [];
  const look = () => window.seen.push([...document.querySelectorAll(".block.conversation")].map((column) => [
    column.querySelector(".turn.growing p")?.textContent.length ?? 0, column.querySelectorAll(".bar").length]));
  new MutationObserver(look).observe(document.body, { subtree: true, childList: true, characterData: true });
}"""


def test_three_turns_side_by_side_rated_exported_and_left(browser, server):
    person = Person(browser, server.url)
    page = person.page
    page.evaluate(WATCH)
    messages = [f"Hello {EVIL}", "日本語 🙂 tell me more", "And the garden?"]
    for number, message in enumerate(messages, 1):
        person.say(message, 2 * number)
    seen = page.evaluate("window.seen")
    assert all(len({row[column][0] for row in seen}) > 5 for column in range(2))  # both grew
    assert any(row[0][0] > 0 and row[1][0] > 0 for row in seen)  # at the same time
    assert [{row[column][1] for row in seen} for column in range(2)] == [{0, 1, 2, 3}] * 2  # a bar for each reply
    assert person.texts(".turn.person p") == messages * 2 and page.title() == "Talk"  # markup is shown, not run
    assert all(re.fullmatch(r" [+-]\d\.\d{3}", text) for text in person.texts(".reward"))
    assert person.texts(".conversation h2") == ["A", "B"] and "GELI" not in page.locator("body").inner_text()
    for width in (1400, 400):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")

    page.locator("#conversation-B [data-face=sadness]").click()
    page.locator("#conversation-B [data-face=sadness][aria-pressed=true]").wait_for()
    person.rate(8, 3, 7, 2)
    titles = person.texts(".conversation h2")
    assert sorted(title[3:] for title in titles) == ["GELI_llama_2", "GELI_llama_2 without its adapter"]
    records = []
    for link in page.locator("#result a").all():
        with page.expect_download() as download:
            link.click()
        records.append(json.loads(download.value.path().read_text()))
    stored = [server.talks / record["id"] for record in records]
    assert sorted(stored) == conversations_in(server.talks)
    for column, (record, folder) in enumerate(zip(records, stored, strict=True)):
        assert [turn["text"] for turn in record["turns"]][::2] == messages and len(record["rewards"]) == 3
        assert record["answers"] == {"how_enjoyable": [8, 3][column], "i_like_you": [7, 2][column]}
        assert record["turns"][-1]["reaction"] == [None, "sadness"][column]
        about = json.loads((folder / "metadata.json").read_text())
        assert about["column"] == "AB"[column] and about["beside"] == records[1 - column]["id"]
        assert about["adapter"] == ("without" not in titles[column])
        assert utterances(folder) == [" ".join(turn["text"].split()) for turn in record["turns"]]

    page.locator("#again").click()
    page.locator("#message textarea").wait_for()
    person.say("I am soon gone", 2)
    page.locator("#undo").click()
    page.wait_for_function("document.querySelector('#message textarea').value === 'I am soon gone'")
    page.locator("#message textarea").press("Enter")
    person.wait_for_replies(2)
    page.locator("#retry").click()
    person.wait_for_replies(0, whole=False)
    person.wait_for_replies(2)
    assert person.went_elsewhere(server.url) == [] and person.wrong == []
    person.page.close()  # the window is closed
    wait_for(server.process, "2 finished, 2 broken off")
    for folder in conversations_in(server.talks / ".broken_off"):
        assert utterances(folder)[:1] == ["I am soon gone"] and len(utterances(folder)) == 2


def test_two_people_do_not_see_each_other_and_a_third_waits(browser, server):
    ann, bob = Person(browser, server.url), Person(browser, server.url, agree=False)
    ann.begin_to_say("I am Ann")
    bob.say("I am Bob", 2)
    ann.wait_for_replies(2)
    ann.say("Ann again", 4)
    keys = [person.page.locator("#session").get_attribute("data-key") for person in (ann, bob)]
    assert keys[0] != keys[1] and min(map(len, keys)) == 32
    assert ann.texts(".turn.person p") == ["I am Ann", "Ann again"] * 2
    assert bob.texts(".turn.person p") == ["I am Bob"] * 2

    eve = Person(browser, server.url, agree=None)
    eve.page.get_by_text("You are number 1 in the queue").wait_for()
    assert not eve.page.locator("#message").is_visible() and not eve.page.locator("#agree").is_visible()
    for key in (keys[1], "A" * 32):  # Bob's conversation goes on, and nobody's has the other key
        assert eve.page.request.get(f"{server.url}talk/{key}/export/0").status == 404
    bob.page.close()
    eve.page.locator("#agree").click()  # has Bob's place
    eve.page.locator("#message textarea").wait_for()
    assert eve.texts(".turn") == [] and ann.wrong == eve.wrong == []
    ann.rate(9, 8, 7, 6)
    said = [text for path in server.talks.rglob("transcript_cliffhanger.csv") for text in utterances(path.parents[1])]
    assert said.count("I am Ann") == said.count("Ann again") == 2 and "I am Bob" not in said  # Bob did not agree
    for person in (ann, eve):
        person.page.close()


# ---------------------------------------------------------------------------------------------------------------------
# The camera

NEUTRAL = HAPPY = 4  # seconds of the film, again and again
# Counts what is asked of the camera, and keeps when, and a piece of each picture that is sent.
SPY = """
  window.asked = 0; window.frames = []; window.pieces = [];
  const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices), send = window.fetch;
  navigator.mediaDevices.getUserMedia = async (wishes) => {
    window.asked += 1;
    window.stream = await ask(wishes);
    window.started = Date.now();
    return window.stream;
  };
  window.fetch = (address, options) => {
    if (String(address).includes("/frame/")) {
      window.frames.push(Date.now());
      const middle = options.body.length / 2;
      window.pieces.push([...options.body.slice(middle, middle + 64)]);
    }
    return send(address, options);
  };
"""


@pytest.fixture
def filmed(chromium, tmp_path):
    """A browser whose camera shows a face: neutral, then happy. It keeps its files in `tmp_path`."""
    face_clips = pytest.importorskip("face_clips", reason="needs av (apps/calls/requirements.txt)")
    face_clips.clips_or_skip()
    import av  # which face_clips needs

    rate, size = 10, (320, 180)
    film = tmp_path / "film.y4m"
    with open(film, "wb") as file:
        file.write(f"YUV4MPEG2 W{size[0]} H{size[1]} F{rate}:1 Ip A1:1 C420\n".encode())
        for face, seconds in (("neutral", NEUTRAL), ("happiness", HAPPY)):
            for frame in face_clips.second_of(face_clips.MAN, face, size)[::3] * seconds:
                planes = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p").to_ndarray()
                file.write(b"FRAME\n" + planes.tobytes())
    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # the browser's question: yes
    flags.append(f"--use-file-for-fake-video-capture={film}")
    kind, options = chromium
    started = kind.launch_persistent_context(tmp_path / "browser", **options | {"args": [*options["args"], *flags]})
    yield started
    started.close()


def check_faces(folder, started: float, frames: list[float]) -> None:
    """Checks the faces that were stored against the film.

    Args:
        started: when the film began. frames: when pictures were taken. Both in seconds.
    """
    about = json.loads((folder / "metadata.json").read_text())
    assert about["camera"] == "fer"
    rows = rows_of(folder / "audio_video_features.csv")
    rows = [row for row in rows if not row["user_id"].startswith("policy:")]  # one for each second
    seen = {
        second: max(FACES, key=lambda face: float(row[f"prob_face_{face}"]))
        for second, row in enumerate(rows)
        if row["prob_face_happiness"]
    }
    assert len(seen) > NEUTRAL + HAPPY - 1
    checked = set()
    for second, face in seen.items():
        place = (frames[0] + second - min(seen) - started) % (NEUTRAL + HAPPY)
        if min(place % NEUTRAL, NEUTRAL - place % NEUTRAL) > 1:  # not beside a change
            assert face == ("neutral" if place < NEUTRAL else "happiness"), (second, place)
            checked.add(face)
    assert checked == {"neutral", "happiness"}


def test_the_camera_sees_neutral_then_happy_in_the_right_seconds_and_leaves_no_picture(filmed, server, tmp_path):
    before = set(conversations_in(server.talks))
    shy = Person(filmed, server.url, agree=False)
    shy.say("Do you see me?", 2)
    assert not shy.page.locator(".camera").is_visible()  # faces would not be stored
    key = shy.page.locator("#session").get_attribute("data-key")
    assert shy.page.request.post(f"{server.url}talk/{key}/frame/2", data=bytes(16)).status == 403
    shy.page.close()

    person = Person(filmed, server.url, script=SPY)
    page = person.page
    key = page.locator("#session").get_attribute("data-key")
    person.say("Do you see me, who smiles now and then?", 2)
    page.wait_for_timeout(1200)
    assert page.evaluate("[window.asked, window.frames.length]") == [0, 0]  # it was not allowed yet
    assert not page.locator(".camera .light").is_visible()
    page.get_by_role("button", name="Use the camera").click()
    page.locator(".camera .light").wait_for()
    page.wait_for_function(f"window.frames.length > {NEUTRAL + HAPPY}")
    page.locator("#message textarea").press_sequentially("I write")  # and read no longer
    sent = page.evaluate("window.frames.length")
    page.wait_for_timeout(1200)
    assert page.evaluate("window.frames.length") == sent and page.locator(".camera .light").is_visible()
    page.get_by_role("button", name="Stop the camera").click()
    assert page.evaluate("window.stream.getTracks().map((track) => track.readyState)") == ["ended"]
    assert not page.locator(".camera .light").is_visible() and page.evaluate("window.asked") == 1
    frames, started, pieces = (page.evaluate(f"window.{name}") for name in ("frames", "started", "pieces"))
    person.rate(9, 8, 7, 6)
    assert person.went_elsewhere(server.url) == [] and person.wrong == []
    posted = {urlsplit(address).path.replace(key, "KEY") for method, address in person.requests if method == "POST"}
    assert posted == {"/gradio_api/queue/join", "/talk/KEY/writing", "/talk/KEY/frame/320"}
    person.page.close()

    stored = set(conversations_in(server.talks)) - before
    assert len(stored) == 2
    for folder in stored:
        check_faces(folder, started / 1000, [time / 1000 for time in frames])
    probes = [bytes(piece) for piece in pieces]
    for path in (path for path in tmp_path.rglob("*") if path.is_file() and path.name != "film.y4m"):
        assert not any(probe in path.read_bytes() for probe in probes), path
