"""`python -m apps.serve` as OpenRLHF uses it, killed and stopped under load."""

import re
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from conftest import call_script, program, run_script, small_model
from small_models import write_head

from geli import GELIReward
from geli.nets.prompts import prompt_text

TOOL = "apps.serve"


@pytest.fixture(scope="module")
def head(sample, tmp_path_factory):
    encoder = small_model("bart", tmp_path_factory.mktemp("encoder") / "bart", sample)
    return write_head(tmp_path_factory.mktemp("runs") / "run", encoder)


class Server:
    """The tool in a process, and its address."""

    def __init__(self, head, port: int = 0):
        command = [*program(TOOL), "--reward_path", head, "--device", "cpu", "--port", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.url = re.search(r"on (http://\S+):", self.process.stdout.readline())[1]

    def end(self, number: int) -> tuple[int, str]:
        """The exit code after a signal, and what was printed last."""
        self.process.send_signal(number)
        printed = self.process.communicate(timeout=120)[0]
        return self.process.returncode, printed


def remote_rewards(url: str, queries: list[str], prompts: list[str], tries: int = 5) -> list[float]:
    """What OpenRLHF's client does: a POST with a JSON body, whose answer must have `rewards`, tried again on errors."""
    data = {"query": queries, "prompts": prompts, "labels": [""] * len(queries)}
    for _ in range(tries):
        try:
            answer = requests.post(url, json=data, headers={"Content-Type": "application/json"}, timeout=180)
            answer.raise_for_status()
            return answer.json()["rewards"]
        except requests.RequestException:
            time.sleep(0.1)
    raise RuntimeError(f"no answer in {tries} tries")


def made_up(n: int, of: str) -> tuple[list[str], list[str], list[str]]:
    """n queries, their prompts and their responses, which nobody else asks for."""
    prompts = [prompt_text(f" User: I like number {i} {of}.") for i in range(n)]
    responses = [f"And I like {i * i % 17} things, more than {i}." for i in range(n)]
    return [f"{p} {r}</s>" for p, r in zip(prompts, responses, strict=True)], prompts, responses


@pytest.mark.slow
def test_killed_and_stopped_under_load_nobody_gets_a_wrong_score(head):
    reward, server, lock = GELIReward.load(head, device="cpu"), Server(head), threading.Lock()
    address, port, killed = f"{server.url}/get_reward", int(server.url.rpartition(":")[2]), threading.Event()
    answered = {True: 0, False: 0}  # after the kill, before it

    def client(name: int) -> None:
        """Asks until it has had four answers after the kill."""
        after = 0
        while after < 4:
            queries, prompts, responses = made_up(5, f"of {name}/{answered}")
            late = killed.is_set()
            found = remote_rewards(address, queries, prompts, tries=600)
            after += late
            with lock:
                answered[late] += 1
            assert found == pytest.approx(reward(prompts, responses), abs=1e-6)

    with ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(client, name) for name in range(6)]
        while answered[False] < 12:
            time.sleep(0.01)
        killed.set()
        assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
        server = Server(head, port)
        for job in clients:
            job.result(300)
    assert answered[True] >= 24

    with ThreadPoolExecutor(6) as pool:
        for i in range(100):  # on a busy machine, all may be answered before the others are seen to wait
            large = [made_up(60, f"at the end {i}/{name}") for name in range(6)]
            jobs = [pool.submit(remote_rewards, address, queries, prompts, 1) for queries, prompts, _ in large]
            waiting = False
            while not waiting and not all(job.done() for job in jobs):
                waiting = "geli_waiting_texts 300.0" in requests.get(f"{server.url}/metrics", timeout=60).text
            if waiting:
                break
        code, printed = server.end(signal.SIGTERM)
        assert waiting
        for job, (_, prompts, responses) in zip(jobs, large, strict=True):
            assert job.result(60) == pytest.approx(reward(prompts, responses), abs=1e-6)
    assert code == 143 and printed.endswith("stopped; every request that was accepted is answered\n")


@pytest.mark.slow
def test_mistakes_are_answered_in_one_line(head, tmp_path):
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(\"No module named 'uvicorn'\")")
    for words, said, path in (
        (["--reward_path", head, "--host", "0.0.0.0"], "give it a --token_file", ""),
        (["--reward_path", "nobody"], "nobody: expected a run name", ""),
        (
            ["--reward_path", head],
            "'uvicorn'): pip install -r apps/serve/requirements.txt",
            str(tmp_path),
        ),
    ):
        run = run_script if path else lambda script, *words, check, **_: call_script(script, *words, check=check)
        printed = run(TOOL, *words, check=2, PYTHONPATH=path).stderr
        assert said in printed and printed.count("\n") == 1, printed
