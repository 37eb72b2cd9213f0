"""Removes a person's conversations and what was cached of them, and names what was trained on them."""

import csv
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from apps.chat.collect import BROKEN_OFF
from apps.chat.survey import PARTNER_PREFIX
from geli.data.cache import CHECKSUM_BYTES
from geli.data.candor import MOST_BYTES, SURVEY_FILE
from geli.data.chats import chat_files, open_chats
from geli.data.messages import ROLES
from geli.heads import load_reward_head
from geli.report.checks import conversations_seen
from geli.run.errors import UserError, first_line
from geli.run.files import TEMPORARY, atomic_path, read_json_or_empty, temporary_name

LEAST_QUOTE = 25  # characters of an utterance by which it is recognized in other files
RUN_FOLDERS = ("*reward_function_*", "*baselines_*", "rlmf_weights", "wandb")  # that the three commands write
TEXT_FILES = {".csv", ".json", ".jsonl", ".html"}


@dataclass
class Traces:
    """What there is of a person.

    Attributes:
        folders: the conversations that the person takes part in. caches: files and folders with their content.
        lines: file of rated chats -> the numbers of their lines, from 1.
        ids: of all these conversations, also of those that are left in a cache only.
        heads: file of a reward head -> how it saw them. policies: record of a run of stage 3 -> how it saw them.
        mentions: other files of runs that name or quote them.
        unclear: path -> why it was not looked into, or is not removed.
    """

    folders: list[Path] = field(default_factory=list)
    lines: dict[Path, list[int]] = field(default_factory=dict)
    caches: list[Path] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    heads: dict[Path, str] = field(default_factory=dict)
    policies: dict[Path, str] = field(default_factory=dict)
    mentions: list[Path] = field(default_factory=list)
    unclear: dict[Path, str] = field(default_factory=dict)

    def rows(self) -> list[dict[str, str]]:
        """The rows of a table for people."""
        saw = {**self.heads, **self.policies}
        rows = [(path, "conversation", "is removed") for path in self.folders]
        rows += [(f"{path}:{n}", "conversation", "is removed") for path, found in self.lines.items() for n in found]
        rows += [(path, "cache", "is removed; runs make it again") for path in self.caches]
        rows += [(path, "reward head" if path in self.heads else "policy", how) for path, how in saw.items()]
        rows += [(path, "file of a run", "names or quotes them; stays") for path in self.mentions]
        rows += [(path, "unclear", why) for path, why in self.unclear.items()]
        return [{"what": what, "path": str(path), "": happens} for path, what, happens in rows]


def find_traces(user: str, data_dirs: Sequence[Path], output_dir: Path) -> Traces:
    """Everything of a person in folders of conversations and of runs.

    Args:
        user: the person's id, or a chat's. data_dirs: rated chats, and folders in CANDOR's layout, with what
            `Collection` keeps apart in them.
        output_dir: `--output_dir` of the three commands.

    Raises:
        UserError: if a folder or file is missing, the id is a policy's or of a role in a chat, or there is no
            conversation of that person.
    """
    if user.startswith(PARTNER_PREFIX):
        raise UserError(
            f"{user}: expected the id of a person, found a policy's, which speaks in everybody's conversations"
        )
    if missing := [path for path in (*data_dirs, output_dir) if not path.exists()]:
        raise UserError(f"{missing[0]}: expected a folder or file, found none")
    traces, looked_at, quotes = Traces(), 0, set()
    files = [file for path in data_dirs for file in chat_files(path)]
    if files and user in ROLES:
        raise UserError(f"{user}: expected a name or a chat's id, found a role, which is everybody's in {files[0]}")
    for file in files:
        looked_at += find_chats(user, file, traces, quotes)
    for folder in conversation_folders([path for path in data_dirs if path.is_dir()]):
        looked_at += 1
        people = people_in(folder, traces.unclear)
        if user in people and folder.is_symlink():
            traces.unclear[folder] = "a link to a conversation of that person: remove what it leads to"
        elif user in people:
            traces.folders.append(folder)
            traces.ids.add(conversation_id(folder))
            quotes |= quotes_of(folder)
    find_caches(user, output_dir / "cache", traces)
    if not traces.ids:
        unclear = "".join(f"; {path}: {why}" for path, why in traces.unclear.items())
        raise UserError(
            f"{user}: expected an id that speaks in a conversation under {', '.join(map(str, data_dirs))}, found none "
            f"in {looked_at:,} conversations, nor in {output_dir / 'cache'}{unclear}"
        )
    find_heads(output_dir, traces)
    find_policies(data_dirs, output_dir, traces)
    find_mentions(user, quotes, output_dir, traces)
    return traces


def remove(traces: Traces) -> None:
    """Removes conversations and caches. One that is killed while it is removed is no conversation any more, and is
    found again."""
    for path in (*traces.folders, *traces.caches):
        if path.is_dir():
            gone = path if TEMPORARY.fullmatch(path.name) else path.rename(temporary_name(path))
            shutil.rmtree(gone)
        else:
            path.unlink(missing_ok=True)
    for path, numbers in traces.lines.items():
        empty_lines(path, set(numbers))


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


def conversation_folders(data_dirs: Sequence[Path]) -> Iterator[Path]:
    """The conversations' folders, also of those that were broken off, or that a killed run left half written."""
    for folder in (each for data_dir in data_dirs for each in (data_dir, data_dir / BROKEN_OFF)):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            visible = not path.name.startswith(".") or TEMPORARY.fullmatch(path.name)
            if visible and path.is_dir() and ((path / "transcription").is_dir() or (path / SURVEY_FILE).is_file()):
                yield path


def conversation_id(folder: Path) -> str:
    """The id of a conversation, whose folder may be half written."""
    half_written = TEMPORARY.fullmatch(folder.name)
    return half_written["name"] if half_written else folder.name


def tables_of(folder: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """(file, columns with people's ids) of a conversation's files that name all who take part."""
    for path in sorted(folder.glob("transcription/*.csv")):
        yield path, ("speaker", "backchannel_speaker")
    if (folder / SURVEY_FILE).exists():
        yield folder / SURVEY_FILE, ("user_id",)


def people_in(folder: Path, unclear: dict[Path, str]) -> set[str]:
    """The ids of those who take part in a conversation, read from files that need not be valid."""
    people = set()
    for path, columns in tables_of(folder):
        try:
            people |= {(row.get(column) or "").strip() for row in read_rows(path) for column in columns}
        except (OSError, csv.Error) as error:
            unclear[path] = f"cannot be read: {first_line(error)}"
    return people


def quotes_of(folder: Path) -> set[str]:
    """What was said in a conversation, as far as it is long enough to be recognized."""
    quotes = set()
    for path in folder.glob("transcription/*.csv"):
        try:
            quotes |= {(row.get("utterance") or "").strip() for row in read_rows(path)}
        except (OSError, csv.Error):
            continue  # `people_in` has named it
    return {quote for quote in quotes if len(quote) >= LEAST_QUOTE}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none of what is no file, such as a pipe."""
    if not path.is_file():
        return []
    csv.field_size_limit(MOST_BYTES)  # as for readers of the data
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------------------------
# Rated chats


def find_chats(user: str, path: Path, traces: Traces, quotes: set[str]) -> int:
    """Adds the chats in a file in which the person speaks or rates, or whose id it is, and what was said in them.
    Returns how many lines were looked at. Lines need not be valid chats."""
    number = 0
    with open_chats(path) as file:
        for number, line in enumerate(file, start=1):
            place, text = f"{path.name}:{number}", line.decode("utf-8-sig", errors="replace")
            try:
                chat = json.loads(text)
                chat = chat if isinstance(chat, dict) else {"messages": chat}
                messages = [m for m in chat.get("messages") or () if isinstance(m, dict)]
                rated = chat.get("ratings") if isinstance(chat.get("ratings"), dict) else {}
                people = {str(message.get("role")).strip() for message in messages} | rated.keys()
            except (ValueError, TypeError, RecursionError):
                if user in text:
                    traces.unclear[Path(f"{path}:{number}")] = "no chat, but has that id in it: remove it by hand"
                continue
            name = str(chat.get("id") or place)
            if user in people or user == name:
                traces.lines.setdefault(path, []).append(number)
                traces.ids.add(name)
                quotes |= {said for m in messages if len(said := str(m.get("content")).strip()) >= LEAST_QUOTE}
    return number


def empty_lines(path: Path, numbers: set[int]) -> None:
    """Empties lines of a file, whose other lines keep their numbers, by which chats without an id are named."""
    path = path.resolve()
    with atomic_path(path, private=True) as temporary:
        with open_chats(path) as old, open_chats(temporary, "wb") as new:
            new.writelines(b"\n" if number in numbers else line for number, line in enumerate(old, start=1))
        temporary.chmod(path.stat().st_mode & 0o777)


# ---------------------------------------------------------------------------------------------------------------------
# Caches


def find_caches(user: str, folder: Path, traces: Traces) -> None:
    """Adds the caches that hold conversations of the person, and the ids of those conversations.

    A cache of conversations is removed whole, and so is one that cannot be read. Features are kept under hashes of
    tokens, so nobody can tell whose they are: all are removed.
    """
    for path in sorted(folder.glob("conversations-*.cache")):
        try:
            people = cached_people(path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException):
            traces.caches.append(path)
            continue
        found = {conversation for conversation, ids in people.items() if user in (conversation, *ids)}
        traces.ids |= found
        traces.caches += [path] if found else []
    if traces.ids:
        traces.caches += [path for path in folder.glob(".conversations-*") if TEMPORARY.fullmatch(path.name)]
        traces.caches += [folder / "features"] if (folder / "features").is_dir() else []


def cached_people(path: Path) -> dict[str, list[str]]:
    """Conversation id -> user ids, of a file of `ConversationCache`."""
    table = parquet.read_table(pa.BufferReader(path.read_bytes()[CHECKSUM_BYTES:]), columns=["about"])
    return dict(json.loads(about)[:2] for about in table["about"].to_pylist())


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def find_heads(output_dir: Path, traces: Traces) -> None:
    """Adds the reward heads that were trained or validated on the conversations, or whose encoder was."""
    for record in sorted(output_dir.glob("*/reward1_*.json")):
        head, content = record.with_suffix(""), read_json_or_empty(record)
        if not content:
            traces.unclear[record] = "not the record of a run"
            continue
        listed = content.get("validation_conversations")
        validated = traces.ids.intersection(map(str, listed if isinstance(listed, list) else ()))
        try:
            seen = conversations_seen(head, load_reward_head(head).config) if head.is_file() else frozenset()
        except UserError as error:
            traces.unclear[head] = str(error)
            continue
        trained = traces.ids & seen
        if trained or validated:
            said = [f"trained on {len(trained)}"] * bool(trained) + [f"validated on {len(validated)}"] * bool(validated)
            traces.heads[head] = f"{' and '.join(said)} of them; stays: train it again"


def find_policies(data_dirs: Sequence[Path], output_dir: Path, traces: Traces) -> None:
    """Adds the runs of stage 3 whose reward head is among the heads that were trained on the conversations, or whose
    prompts came from these folders."""
    heads = {path.resolve() for path, how in traces.heads.items() if how.startswith("trained")}
    folders = {path.resolve() for path in data_dirs}
    for record in sorted(
        [*output_dir.glob("rlmf_weights/*.json"), *output_dir.glob("rlmf_weights/*.earlier-*/*.json")]
    ):
        content = read_json_or_empty(record)
        arguments, head = content.get("arguments"), content.get("reward_head")
        if not isinstance(arguments, dict) or not (arguments.get("train") or arguments.get("sft_steps")):
            continue
        moved = isinstance(head, str) and output_dir / Path(head).parent.name / Path(head).name
        reasons = []
        if isinstance(head, str) and {Path(head).resolve(), moved.resolve()} & heads:
            reasons.append(f"trained with {Path(head).name}")
        if isinstance(arguments.get("data_dir"), str) and Path(arguments["data_dir"]).resolve() in folders:
            reasons.append(f"had prompts from {arguments['data_dir']}")
        if reasons:
            traces.policies[record] = f"{' and '.join(reasons)}; stays: train it again"


def find_mentions(user: str, quotes: set[str], output_dir: Path, traces: Traces) -> None:
    """Adds the text files of runs that name the person or a conversation, or quote what was said, besides the records
    of heads and policies."""
    records = {path.with_name(f"{path.name}.json") for path in traces.heads} | traces.policies.keys()
    names = re.compile("|".join(rf"(?<![\w.@+-]){re.escape(name)}(?![\w.@+-])" for name in (user, *traces.ids)))
    # as they are, in JSON, and in a cell of a CSV file
    quotes = {form for quote in quotes for form in (quote, json.dumps(quote)[1:-1], quote.replace('"', '""'))}
    files = (path for pattern in RUN_FOLDERS for folder in output_dir.glob(pattern) for path in folder.rglob("*"))
    for path in sorted(files):
        if path.suffix not in TEXT_FILES or path in records or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if names.search(text) or any(quote in text for quote in quotes):
            traces.mentions.append(path)
