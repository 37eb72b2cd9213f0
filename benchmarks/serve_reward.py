"""Requests a second and latency of apps/serve, against calling the head directly on the same texts.

    python benchmarks/serve_reward.py --reward_path RUN --data_dir CORPUS [--texts 2000] [--clients 32]

Work: real states and responses of the corpus, each asked for once. Three ways, each in a process that has one thread
for the model: GELIReward called with all texts at once (stage 3's batches are smaller); the server with one text a
request, as OpenRLHF's current clients ask; the server with 64 texts a request. They take turns, in `--rounds` rounds
without a cache, so that a machine whose speed changes slows all of them. Prints texts a second, the ratio to the direct
call of the same round (median of the rounds), and latencies.
"""

import argparse
import asyncio
import json
import multiprocessing
import re
import sys
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

from apps.serve.server import Limits, RewardServer
from data_utils import make_prompts, read_corpus
from geli.reward import GELIReward
from geli.run.console import format_table


def make_texts(data_dir: str, n: int, context_turns: int) -> list[tuple[str, str]]:
    """n different (prompt, response) of a corpus."""
    trajectories = read_corpus(data_dir, "overall_affect").trajectories.values()
    prompts = make_prompts([t for both in trajectories for t in both], context_turns)
    found = list(dict.fromkeys((prompt.text, prompt.human) for prompt in prompts))
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))[:n]]


def work(reward_path: str, calls, answers) -> None:
    """The process of the model: serves, and answers `calls` of texts directly between the clients' turns."""
    reward = GELIReward.load(reward_path, device="cpu", cache_size=0)
    server = RewardServer(reward, "127.0.0.1", 0, Limits())
    answers.put(server.url)
    threading.Thread(target=server.run, daemon=True).start()
    while (texts := calls.get()) is not None:
        started = time.perf_counter()
        rewards = reward(*map(list, zip(*texts, strict=True)))
        answers.put((time.perf_counter() - started, rewards))


def request_of(texts: list[tuple[str, str]]) -> bytes:
    """A request of OpenRLHF's protocol."""
    prompts, queries = [prompt for prompt, _ in texts], [f"{prompt} {response}" for prompt, response in texts]
    body = json.dumps({"query": queries, "prompts": prompts, "labels": [None] * len(prompts)}).encode()
    return f"POST /get_reward HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def ask(url: str, texts: list[tuple[str, str]], clients: int, together: int) -> tuple[float, list, list]:
    """Seconds for all texts, the rewards, and the latency of each request, by clients that wait for each answer.

    The clients write bytes that were made before, because a comfortable HTTP client takes as much of this machine as
    the server.
    """
    requests = [request_of(texts[i : i + together]) for i in range(0, len(texts), together)]
    answers, latencies, waiting = [b""] * len(requests), [], iter(range(len(requests)))

    async def client() -> None:
        reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"), limit=2**20)
        for i in waiting:
            started = time.perf_counter()
            writer.write(requests[i])
            head = await reader.readuntil(b"\r\n\r\n")
            answers[i] = await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
            latencies.append(time.perf_counter() - started)
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - started
    return seconds, [reward for answer in answers for reward in json.loads(answer)["rewards"]], latencies


def main() -> None:
    """Measures all three, in turns."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reward_path", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context_turns", type=int, default=10)
    args = parser.parse_args()
    texts = make_texts(args.data_dir, args.texts, args.context_turns)
    context = multiprocessing.get_context("spawn")
    calls, answers = context.Queue(), context.Queue()
    process = context.Process(target=work, args=(args.reward_path, calls, answers), daemon=True)
    process.start()
    url, ways = answers.get(), {"one text a request": 1, "64 texts a request": 64}
    asyncio.run(ask(url, texts[:100], args.clients, 1))  # the first texts are slower
    direct, seconds, latencies = [], {name: [] for name in ways}, {name: [] for name in ways}
    for _ in range(args.rounds):
        calls.put(texts)
        took, expected = answers.get()
        direct.append(took)
        for name, together in ways.items():
            took, found, times = asyncio.run(ask(url, texts, args.clients, together))
            assert np.allclose(found, expected, atol=1e-5), "a reward over HTTP differs"
            seconds[name].append(took)
            latencies[name] += times
    calls.put(None)
    process.terminate()
    rate = len(texts) / median(direct)
    rows = [{"way": "called directly", "texts/s": rate, "ratio": 1.0, "p50 ms": None, "p99 ms": None}]
    for name in ways:
        p50, p99 = np.percentile(latencies[name], (50, 99)) * 1000
        ratio = median(d / s for d, s in zip(direct, seconds[name], strict=True))
        rate = len(texts) / median(seconds[name])
        rows.append({"way": name, "texts/s": rate, "ratio": ratio, "p50 ms": p50, "p99 ms": p99})
    print(format_table(rows, f"{len(texts):,} texts, {args.clients} clients, {args.rounds} rounds"))


if __name__ == "__main__":
    main()
