"""Reads all conversations of a folder, in several processes, or of rated chats; with a cache."""

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
from geli.data.chats import ChatFiles, Range, chat_files
from geli.run.console import progress_bar
from geli.run.distributed import available_cores
from geli.run.errors import UserError

PARALLEL_FROM = 100  # folders; reading fewer takes less time than starting processes

_HOW_TO_GET_DATA = (
    "candor/README.md says how to get CANDOR; `python tools/sample_candor.py OUT` or `tools/convert_corpus.py` makes "
    "data to try"
)


def read_conversations(
    data_dir: str | Path, transcript: str = "cliffhanger", cache: str | Path | None = None,
    rating_range: Range | None = None,
) -> tuple[list[Conversation], dict[str, str]]:  # fmt: skip
    """The conversations in the folders in `data_dir`, or in rated chats, in the order of `split_key`; and name of a
    folder, or file and line of a chat -> reason of those dropped.

    Args:
        data_dir: a folder in CANDOR's layout, a JSONL file, or a folder of them.
        transcript: one of `candor.TRANSCRIPTS`. cache: folder of a `ConversationCache`; None for no cache.
        rating_range: as of `ChatFiles`.

    Raises:
        UserError: if there is no such folder or file, or no usable conversation, or an option is for the other kind.
    """
    data_dir = Path(data_dir)
    files = chat_files(data_dir)
    if files:
        if transcript != "cliffhanger":
            raise UserError(f"--transcript {transcript} is for folders in CANDOR's layout, {data_dir} has chats")
        kept = ConversationCache(cache, data_dir, "") if cache else None
        results = _read_or_recall_chats(ChatFiles(files, rating_range), kept)
    else:
        if rating_range:
            raise UserError(f"--rating_range is for JSONL files of rated chats, {data_dir} is none and has none in it")
        folders, links = _folders(data_dir)
        kept = ConversationCache(cache, data_dir, transcript) if cache else None
        results = links | _read_or_recall(folders, transcript, kept)
    conversations = [result for result in results.values() if isinstance(result, Conversation)]
    dropped = {name: result for name, result in results.items() if not isinstance(result, Conversation)}
    if not conversations:
        raise UserError(_nothing_usable(data_dir, dropped, "" if files else transcript))
    return sorted(conversations, key=lambda conversation: split_key(conversation.id)), dropped


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


def _read_or_recall(
    folders: list[Path], transcript: str, kept: ConversationCache | None
) -> dict[str, Conversation | str]:
    """Folder name -> its conversation, from the cache if its files are unchanged, or the reason why it is dropped."""
    signatures = {folder.name: kept.signature(folder) for folder in folders} if kept else {}  # from before reading
    results = {folder.name: kept.get(folder.name, signatures[folder.name]) if kept else None for folder in folders}
    missing = [folder for folder in folders if results[folder.name] is None]
    results |= zip((folder.name for folder in missing), _read_many(missing, transcript), strict=True)
    if kept:
        kept.update({name: (signatures[name], c) for name, c in results.items() if isinstance(c, Conversation)})
    return results


def _read_or_recall_chats(files: ChatFiles, kept: ConversationCache | None) -> dict[str, Conversation | str]:
    """File and line -> its chat, from the cache if the line is unchanged, or the reason why it is dropped."""
    signatures = {}

    def recall(place: str, line: bytes) -> Conversation | None:
        signatures[place] = hashlib.blake2b(line, digest_size=16).hexdigest()
        return kept.get(place, signatures[place])

    chats = files.chats(recall) if kept else files.chats()
    results = dict(progress_bar(chats, desc="reading chats", unit="chat"))
    if kept:
        kept.update({place: (signatures[place], c) for place, c in results.items() if isinstance(c, Conversation)})
    return results


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
    kind = "folder" if transcript else "chat"
    found = (
        f"found {len(dropped)} {kind}s, none usable: {common_reasons(dropped)}" if dropped else f"found no {kind} in it"
    )
    expected = (
        f"<conversation>/transcription/transcript_{transcript}.csv, {SURVEY_FILE} and, for faces, {FEATURES_FILE}"
        if transcript
        else "rated chats, one a line (docs/rated-chats.md)"
    )
    return f"--data_dir {data_dir}: expected {expected}; {found}; {_HOW_TO_GET_DATA}"
