"""Reads all conversations of a folder, in several processes, with a cache."""

import hashlib
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

from geli.data.cache import ConversationCache
from geli.data.candor import FEATURES_FILE, SURVEY_FILE, Conversation, conversation_or_reason
from geli.run.console import progress_bar
from geli.run.distributed import available_cores
from geli.run.errors import UserError

PARALLEL_FROM = 100  # folders; reading fewer takes less time than starting processes

_HOW_TO_GET_DATA = (
    "candor/README.md says how to get CANDOR; `python tools/sample_candor.py OUT` or `tools/convert_corpus.py` makes "
    "data to try"
)


def read_conversations(
    data_dir: str | Path, transcript: str = "cliffhanger", cache: str | Path | None = None
) -> tuple[list[Conversation], dict[str, str]]:
    """The conversations in the folders in `data_dir`, in the order of `split_key`, and folder name -> reason of those
    dropped. Raises a `UserError` if `data_dir` is not a folder, or has no usable conversation.

    Args:
        transcript: one of `candor.TRANSCRIPTS`. cache: folder of a `ConversationCache`; None for no cache.
    """
    data_dir = Path(data_dir)
    folders, dropped = _folders(data_dir)
    conversations = []
    for folder, result in zip(folders, _read_or_recall(folders, data_dir, transcript, cache), strict=True):
        if isinstance(result, Conversation):
            conversations.append(result)
        else:
            dropped[folder.name] = result
    if not conversations:
        raise UserError(_nothing_usable(data_dir, dropped, transcript))
    return conversations, dropped


def split_key(conversation_id: str) -> str:
    """The hash that orders conversations, so that splits are the same on every machine and file system."""
    return hashlib.sha256(conversation_id.encode("utf-8", "surrogateescape")).hexdigest()


def by_count(reasons: Iterable[str]) -> dict[str, int]:
    """Reason -> how often, the most frequent first."""
    return dict(sorted(Counter(reasons).items(), key=lambda item: (-item[1], item[0])))


def common_reasons(dropped: Mapping[str, str]) -> str:
    """The five most frequent reasons in name -> reason, each with how often."""
    return "; ".join(f"{reason} ({n})" for reason, n in list(by_count(dropped.values()).items())[:5])


def printable(name: str) -> str:
    """A folder's name in one line that can be printed."""
    return name if name.isprintable() else ascii(name)


def _read_or_recall(folders: list[Path], data_dir: Path, transcript: str, cache) -> list[Conversation | str]:
    """The conversation of each folder, from the cache if its files are unchanged, or the reason why it is dropped."""
    kept = ConversationCache(cache, data_dir, transcript) if cache else None
    results = {folder: kept.get(folder) for folder in folders} if kept else dict.fromkeys(folders)
    missing = [folder for folder, conversation in results.items() if conversation is None]
    signatures = {folder: kept.signature(folder) for folder in missing} if kept else {}  # from before reading
    results |= zip(missing, _read_many(missing, transcript), strict=True)
    usable = [folder for folder in folders if isinstance(results[folder], Conversation)]
    if kept and (any(folder in signatures for folder in usable) or kept.has_more_than(usable)):
        kept.write({folder: (signatures.get(folder), results[folder]) for folder in usable})
    return list(results.values())


def _read_many(folders: list[Path], transcript: str) -> Iterable[Conversation | str]:
    """Reads folders, many of them in as many processes as there are cores."""
    read = partial(conversation_or_reason, transcript=transcript)
    bar = partial(progress_bar, total=len(folders), desc="reading conversations", unit="conversation")
    if len(folders) < PARALLEL_FROM or available_cores() == 1:
        return list(bar(map(read, folders)))
    # spawned, because a forked child of a process that has started threads can hang
    with ProcessPoolExecutor(available_cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
        with _main_module_hidden():
            results = pool.map(read, folders, chunksize=16)  # submits all work, which starts all processes
        return list(bar(results))


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Spawned processes that start inside this context do not import the main script.

    They would run its imports (torch, transformers) for seconds each, although they need `candor` alone.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _folders(data_dir: Path) -> tuple[list[Path], dict[str, str]]:
    """The conversations' folders in the order of `split_key`, and name -> reason of links to one of them, which are
    dropped: a conversation that is there twice could be in training and in validation."""
    try:
        listed = [data_dir / name for name in os.listdir(data_dir) if not name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"--data_dir {data_dir}: {error.strerror.lower()}; expected a folder with one folder a conversation "
            f"({_HOW_TO_GET_DATA})"
        ) from None
    entries = [path for path in listed if os.path.isdir(path) or not os.path.exists(path)]  # reports broken links too
    folders, links, names = [], {}, {}
    for path in sorted(entries, key=lambda path: (path.is_symlink(), split_key(path.name))):
        try:
            status = path.stat()
            first = names.setdefault((status.st_dev, status.st_ino), path.name)
        except OSError:
            first = path.name
        if first == path.name:
            folders.append(path)
        else:
            links[path.name] = f"a link to another conversation's folder, {printable(first)}"
    return sorted(folders, key=lambda path: split_key(path.name)), links


def _nothing_usable(data_dir: Path, dropped: dict[str, str], transcript: str) -> str:
    found = (
        f"found {len(dropped)} folders, none usable: {common_reasons(dropped)}" if dropped else "found no folder in it"
    )
    return (
        f"--data_dir {data_dir}: expected <conversation>/transcription/transcript_{transcript}.csv, {SURVEY_FILE} and, "
        f"for faces, {FEATURES_FILE}; {found}; {_HOW_TO_GET_DATA}"
    )
