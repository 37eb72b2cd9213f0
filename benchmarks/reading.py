"""Reading CANDOR: ours, cold and warm, against reading whole tables and filtering them for every turn.

    python benchmarks/reading.py [--conversations 1656] [--picture docs/reading.png]
    python benchmarks/reading.py --chats 100000    # rated chats, against json.loads of the same lines

Work: conversations of 320 transcript rows, and 1,900 seconds x 2 speakers x 70 columns of features. Peer: the published
reading and alignment (`as_published.read_conversation`), on a few of the same conversations, since it takes long.
Prints seconds a conversation, ratios, and the peak memory of all processes together; checks that both find the same
affects for the same turns.
"""

import argparse
import json
import resource
import tempfile
import threading
import time
from pathlib import Path

import as_published
import numpy as np
import psutil

from data_utils import Corpus, read_corpus
from experiments import plots
from geli.data.candor import FACES
from geli.data.chats import ChatFiles
from geli.run.console import format_table
from geli.run.distributed import available_cores
from tools import sample_chats

ROWS, SECONDS, COLUMNS = 320, 1900, 70
WORDS = "well I think that we could maybe go and see it because you know it was really nice of them to say so".split()
PEER_CONVERSATIONS = 8


def write_corpus(folder: Path, conversations: int) -> None:
    """Conversations of CANDOR's size, different in every cell that is read."""
    rng = np.random.default_rng(0)
    faces = [f"prob_face_{face}" for face in FACES]
    others = [f"feature_{i}" for i in range(COLUMNS - len(faces) - 2)]
    fillers = [  # cells that nobody reads
        [",".join(f"{x:.6f}" for x in row) for row in rng.random((2 * SECONDS, len(others)))] for _ in range(2)
    ]
    stamps = [f"0 days {s // 3600:02d}:{s // 60 % 60:02d}:{s % 60:02d}" for s in range(SECONDS)]
    for n in range(conversations):
        path = folder / f"{rng.integers(1 << 60):016x}"
        (path / "transcription").mkdir(parents=True)
        users = [f"user-{n}-{i}" for i in range(2)]
        stops = np.sort(rng.choice(np.arange(3, 10 * SECONDS - 10), ROWS, replace=False)) / 10
        starts = np.concatenate([[0.0], stops[:-1] + 0.1])
        lines = ["turn_id,speaker,start,stop,utterance,interval,delta,questions,end_question,overlap,n_words"]
        for i, (start, stop, words) in enumerate(zip(starts, stops, rng.integers(3, 25, ROWS), strict=True)):
            text = " ".join(rng.choice(WORDS, words))
            lines.append(f"{i},{users[i % 2]},{start:.2f},{max(start, stop):.2f},{text},,,0,False,False,{words}")
        (path / "transcription" / "transcript_cliffhanger.csv").write_text("\n".join(lines))
        frames = rng.random((2 * SECONDS, len(faces)))
        cells = [",".join(map("{:.6f}".format, row)) for row in frames]
        lines = [",".join(["user_id", "timedelta", *faces, *others])]
        filler = fillers[n % len(fillers)]
        rows = zip(np.repeat(users, SECONDS), stamps * 2, cells, filler, strict=True)
        lines += [",".join(row) for row in rows]
        (path / "audio_video_features.csv").write_text("\n".join(lines))
        questions = ["overall_affect", *(f"question_{i}" for i in range(239))]
        answers = [",".join([user, *map(str, rng.integers(1, 10, len(questions)))]) for user in users]
        (path / "survey.csv").write_text("\n".join([",".join(["user_id", *questions]), *answers]))


class PeakMemory:
    """Peak of the resident memory of this process and its children, in GiB, sampled every 20 ms."""

    def __enter__(self):
        self.peak, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _watch(self):
        me = psutil.Process()
        while not self._done.wait(0.02):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak = max(self.peak, total / 2**30)


def timed(function, *arguments, **options):
    """Seconds, and what the function returned."""
    start = time.perf_counter()
    result = function(*arguments, **options)
    return time.perf_counter() - start, result


def read_ours(folder: Path, names: list[str], temporary: Path) -> tuple[dict, Corpus]:
    """Reads the conversations `names` with an empty and with a filled cache; a row of the table, and the corpus."""
    n = len(names)
    part, cache = temporary / f"candor-{n}", temporary / f"cache-{n}"
    part.mkdir()
    for name in names:
        (part / name).symlink_to(folder / name)
    with PeakMemory() as memory:
        cold, corpus = timed(read_corpus, part, "overall_affect", cache=cache)
        warm, again = timed(read_corpus, part, "overall_affect", cache=cache)
    assert corpus == again and len(corpus.conversations) == n
    row = {"conversations": n, "cold s": cold, "cold ms each": 1e3 * cold / n, "warm s": warm}
    return {**row, "warm ms each": 1e3 * warm / n, "peak GiB": memory.peak}, corpus


def read_as_published(folder: Path, corpus: Corpus) -> float:
    """Milliseconds a conversation of the published procedure, on the first conversations of `corpus`; checks that it
    finds the same affects."""
    chosen = corpus.conversations[:PEER_CONVERSATIONS]
    as_published.read_conversation(folder / chosen[0].id)  # warms up
    seconds, found = timed(lambda: [as_published.read_conversation(folder / c.id) for c in chosen])
    for conversation, turns in zip(chosen, found, strict=True):
        assert turns == [(turn.turn_id, turn.speaker, FACES[turn.affect]) for turn in conversation.turns]
    return 1e3 * seconds / len(chosen)


def read_chats(n: int, folder: Path) -> dict:
    """Streams `n` rated chats from a file: a row of the table. Seconds are this process' own."""
    path = folder / f"{n}.jsonl"
    header, *some = sample_chats.chats(min(n, 1000), turns=12, thumbs=0.1, seed=0)
    with open(path, "w") as file:
        file.write(f"{json.dumps(header)}\n")
        file.writelines(f"{json.dumps(some[i % len(some)] | {'id': f'chat-{i}'})}\n" for i in range(n))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with open(path, "rb") as file:
        for line in file:
            json.loads(line)
    parsed = time.process_time() - start
    found = sum(not isinstance(chat, str) for _, chat in ChatFiles([path]).chats())
    seconds = time.process_time() - start - parsed
    assert found == n
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    row = {"chats": n, "MiB": path.stat().st_size / 2**20, "json.loads s": parsed, "read s": seconds}
    return {**row, "times json.loads": seconds / parsed, "memory MiB": more}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=1656, help="size of the corpus; CANDOR has 1,656")
    parser.add_argument("--picture", type=Path, help="file to draw milliseconds a conversation to")
    parser.add_argument("--chats", type=int, help="read this many rated chats in place of it, and a tenth of them")
    args = parser.parse_args()
    if args.chats:
        with tempfile.TemporaryDirectory() as temporary:
            rows = [read_chats(n, Path(temporary)) for n in (args.chats // 10, args.chats)]
        print(format_table(rows, "Rated chats, one process"))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "candor"
        print(f"Writing {args.conversations} conversations …", flush=True)
        write_corpus(folder, args.conversations)
        names = sorted(path.name for path in folder.iterdir())
        sizes = sorted({n for n in (50, 200, 800, args.conversations) if n <= args.conversations})
        rows, corpora = zip(*(read_ours(folder, names[:n], Path(temporary)) for n in sizes), strict=True)
        published = read_as_published(folder, corpora[-1])
    cold, warm = (published / rows[-1][f"{name} ms each"] for name in ("cold", "warm"))
    print(format_table(rows, f"\nOurs, {available_cores()} cores"))
    print(f"\nAs published: {published:.0f} ms each (of {PEER_CONVERSATIONS}), same affects for the same turns")
    print(f"Cold: {cold:.1f} times faster; warm: {warm:.0f} times")
    print(f"Peak memory: {max(row['peak GiB'] for row in rows):.2f} GiB")
    if args.picture:
        print(f"Written: {plots.reading(rows, published, args.picture)}")


if __name__ == "__main__":
    main()
