"""No conversation text, user id or conversation id reaches wandb without `--log_text`; files with text are private."""

import base64
import gzip
import json
import os
import random
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import wandb
from conftest import ROOT, call_script, environment_of_its_own, run_script

from geli.data.questions import QUESTIONS
from tools import tiny_models
from tools.writer import write_conversation

pytestmark = pytest.mark.slow

TEXT, USER, CONVERSATION = MARKERS = ("zqtextqz", "zquserqz", "zqconvqz")


def write_marked(folder: Path, conversations: int) -> None:
    """A corpus in whose every utterance, user id and conversation id a marker stands, and broken conversations."""
    rng = random.Random(0)
    for n in range(conversations):
        users, turns, faces = [f"{USER}-{n}-{side}" for side in "ab"], [], []
        for i in range(12):
            word = rng.choice(("rain", "bread", "piano", "river"))
            turns.append((users[i % 2], 4.0 * i, 4.0 * i + 3, f"{TEXT} I like the {word} {TEXT} very much"))
            if rng.random() < 0.5:
                faces.append((users[(i + 1) % 2], 4.0 * i, 4.0 * i + 3, "happiness"))
        answers = {user: dict.fromkeys(QUESTIONS, rng.randint(1, 9)) for user in users}
        if n % 5 == 4:  # a trajectory that is dropped
            answers[users[0]] = {}
        write_conversation(folder / f"{CONVERSATION}-{n}", turns, faces, answers)
    for n, name in enumerate(("transcription/transcript_cliffhanger.csv", "survey.csv", "audio_video_features.csv")):
        path = folder / f"{CONVERSATION}-broken-{n}"
        write_conversation(path, turns, faces, answers)
        (path / name).write_text(f"{TEXT},{USER}\n{CONVERSATION},1,2,3\n")


def records(content: bytes) -> bytes:
    """The records of a .wandb file, end to end: blocks of 32 KiB (after a header of 7 bytes), in which each piece of a
    record has a header of 7 bytes with its length."""
    found, place, block = b"", 7, 1 << 15
    while place + 7 <= len(content):
        left = block - place % block
        if left < 7:
            place += left
            continue
        size = struct.unpack_from("<H", content, place + 4)[0]
        found += content[place + 7 : place + 7 + size]
        place += 7 + size
    return found


def contents(path: Path) -> list[bytes]:
    """A file's bytes, as they are and as far as they can be unpacked."""
    raw = path.read_bytes()
    found = [raw, str(path).encode()]
    if path.suffix == ".wandb":
        found.append(records(raw))
        assert b"reward_class" in found[-1] or b"exp_name" in found[-1]  # it is read: the run's options are there
    if path.suffix == ".parquet":
        found.append(pd.read_parquet(path).to_csv().encode())
    for unpack in (gzip.decompress, zlib.decompress):
        try:
            found.append(unpack(raw))
        except (OSError, zlib.error, EOFError):
            continue
    return found


def shapes_of(marker: str) -> list[bytes]:
    """What a marker may look like in a file."""
    texts = [marker, marker.upper(), marker.encode().hex(), "".join(f"\\u{ord(c):04x}" for c in marker)]
    texts += ["".join(f"%{ord(c):02x}" for c in marker)]
    shifted = [base64.b64encode(b"\0" * shift + marker.encode())[4:-4] for shift in range(3)]
    return [*(t.encode() for t in texts), marker.encode("utf-16-le"), marker.encode("utf-16-be"), *shifted]


def found_in(*folders: Path) -> dict[str, set[str]]:
    """Marker -> names of the files below the folders in which it stands."""
    found: dict[str, set[str]] = {}
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        parts = contents(path)
        for marker in MARKERS:
            if any(shape in part for part in parts for shape in shapes_of(marker)):
                found.setdefault(marker, set()).add(path.name)
    return found


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """The corpus, models trained on it, and the folders that wandb keeps elsewhere."""
    folder = tmp_path_factory.mktemp("marked")
    write_marked(folder / "candor", 15)
    tiny_models.build(folder / "candor", folder / "models", ("bart", "llama"), seed=0, steps=40)
    elsewhere = {name: str(folder / name.lower()) for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")}
    # what a user may have set for other programs
    elsewhere |= {"WANDB_CONSOLE": "wrap", "WANDB_SAVE_CODE": "true", "WANDB_DISABLE_CODE": "false"}
    return SimpleNamespace(data=folder / "candor", models=folder / "models", folder=folder, environment=elsewhere)


def commands(marked, out: Path) -> list[tuple]:
    """The three stages, with every option that logs more but `--log_text`."""
    common = ("--data_dir", marked.data, "--output_dir", out, "--context_turns", 3)
    reward = (*common, "--small_model_shrink", "--epochs", 2, "--val", "--val_all", "--bar_chart", "--contrastive")
    first = ("--lang_model_path", marked.models / "bart", "--run_name", "li", "--train_size", 8)
    second = ("--affect_path", "li", "--run_name", "geli", "--train", "--train_size", 8)
    third = ("--model_name", marked.models / "llama", "--train", "--val", "--generate", "--steps", 2)
    third = (*third, "--allow_constant_reward", "--batch_size", 4, "--val_prompts", 4, *common)
    return [
        ("train_reward_LI_only.py", *reward, *first),
        ("train_reward_GELI.py", *reward, *second),
        ("train_rl_GELI.py", *third),
    ]


@pytest.fixture(scope="module")
def ran(marked, tmp_path_factory):
    """All three stages without `--log_text`: the output folder, and what they printed."""
    out = tmp_path_factory.mktemp("quiet")
    before = os.umask(0o022)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in marked.environment.items():
            patch.setenv(name, value)
        first, *others = commands(marked, out)
        wandb.teardown()  # what other tests have started knows nothing of these settings
        printed = [run_script(*first).stdout, *(call_script(*command).stdout for command in others)]
        wandb.teardown()  # else it writes on for a while
    os.umask(before)
    return out, printed


def test_the_markers_are_in_all_that_could_leak(ran):
    out, printed = ran
    assert f"{CONVERSATION}-broken-0: transcript" in printed[0]  # dropped conversations are named
    responses = pd.read_csv(out / "rlmf_weights" / "GELI_llama_responses.csv")
    for who in ("prompt", "human", "base", "tuned"):  # and the policy says the marker
        assert responses[who].str.contains(TEXT).any(), who
    assert TEXT not in printed[2]  # sample responses are for a terminal alone
    table = next(out.glob("visual*/val_turn_rewards_geli.csv")).read_text()
    assert CONVERSATION in table and USER in table and TEXT not in table


def test_nothing_that_wandb_keeps_has_a_marker(ran, marked):
    out, _ = ran
    folders = [out / "wandb", *(Path(v) for k, v in marked.environment.items() if k.endswith("_DIR"))]
    runs = list((out / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 3 and any((out / "wandb").rglob("*.table.json"))  # the bar charts' tables
    assert found_in(*folders) == {}


def test_nothing_that_wandb_keeps_tells_of_this_machine(ran, marked):
    out, _ = ran
    for path in (out / "wandb").glob("offline-run-*/*.wandb"):
        content = records(path.read_bytes())
        for told in (str(marked.data), str(marked.models), str(out), "--small_model_shrink", "train_reward_LI_only.py"):
            assert told.encode() not in content, told
        assert b"candor" in content or b"llama" in content  # but what was trained on what


def test_the_search_finds_markers_however_they_are_written(tmp_path):
    for number, shape in enumerate(shapes_of(TEXT)):
        (tmp_path / f"{number}.json").write_bytes(b"{...." + shape + b"....}")
    (tmp_path / "a.gz").write_bytes(gzip.compress(f"x {USER} y".encode()))
    part = f"reward_class {CONVERSATION}".encode()
    pieces = (part[:16], part[16:])
    framed = b"".join(struct.pack("<IHB", 0, len(piece), 1) + piece for piece in pieces)
    (tmp_path / "run.wandb").write_bytes(b":W&B\0\0\0" + framed)
    found = found_in(tmp_path)
    assert len(found[TEXT]) == len(shapes_of(TEXT)) and found[USER] == {"a.gz"} and found[CONVERSATION] == {"run.wandb"}


def test_with_log_text_it_is_found(ran, marked, tmp_path, monkeypatch):
    out, _ = ran
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    head = next(out.glob("visual*/reward1_geli"))
    common = ("--data_dir", marked.data, "--output_dir", tmp_path, "--log_text")
    (tmp_path / "wandb").mkdir(mode=0o755)
    call_script("train_reward_GELI.py", "--val", "--reward_path", head, "--run_name", "told", *common)
    wandb.teardown()
    assert set(found_in(tmp_path / "wandb")) == set(MARKERS)
    call_script(*commands(marked, tmp_path)[2], "--log_text", "--reward_path", head)
    tables = [path.read_text() for path in (tmp_path / "wandb").rglob("*responses*.table.json")]
    assert tables and all(TEXT in table for table in tables)
    assert (tmp_path / "wandb").stat().st_mode & 0o077 == 0  # and then its folder is for its owner only
    staged = [path for path in (tmp_path / "staged").rglob("*") if path.is_file()]  # wandb's own copies
    assert not any(readable_by_others(path, tmp_path) for path in staged)


FAILING = f"""
import sys, train_reward_LI_only as stage
from geli.run.errors import run
def fail(*_, **__):
    raise RuntimeError("{CONVERSATION}: {TEXT} of {USER}")
stage.finish_run = fail
sys.argv[0] = "train_reward_LI_only.py"
run(lambda: stage.main(stage.parse_options()))
"""


def test_an_error_after_wandb_has_started_does_not_reach_it(marked, tmp_path):
    _, *options = commands(marked, tmp_path)[0]
    own = environment_of_its_own()
    stopped = subprocess.run(
        [sys.executable, "-c", FAILING, *map(str, options)],
        capture_output=True,
        text=True,
        env={**own, **marked.environment, "PYTHONPATH": str(ROOT)},
    )
    assert "Traceback" in stopped.stderr and TEXT in stopped.stderr
    assert list((tmp_path / "wandb").rglob("*.wandb")) and found_in(tmp_path / "wandb") == {}


# ---------------------------------------------------------------------------------------------------------------------
# On this machine


def readable_by_others(path: Path, root: Path) -> bool:
    """Whether somebody else can read a file below `root`, going by the modes from there on."""
    folders = [parent for parent in path.parents if parent.is_relative_to(root) and parent != root]
    return bool(path.stat().st_mode & 0o044) and all(folder.stat().st_mode & 0o011 for folder in folders)


def test_files_with_text_are_for_their_owner_only(ran):
    out, _ = ran
    told = [path for path in out.rglob("*") if path.is_file() and any(TEXT.encode() in part for part in contents(path))]
    told = [path for path in told if not re.fullmatch(r"tokenizer.*|vocab.*|merges.*", path.name)]  # the models' own
    told += (out / "cache").rglob("*.cache")  # compressed
    assert {path.suffix for path in told} >= {".csv", ".cache"}
    assert [path for path in told if readable_by_others(path, out)] == []
    kept = [path for path in (out / "cache").rglob("*") if path.is_file()]
    assert len(kept) > 1 and not any(readable_by_others(path, out) for path in kept)


def test_converted_conversations_are_for_their_owner_only(tmp_path):
    people = {name: {"outcomes": {}} for name in ("a", "b")}
    said = [{"id": "a", "text": "hello"}, {"id": "b", "text": "hi"}]
    dialogues = [{"dialogue_id": 1, "participant_info": people, "chat_logs": said}]
    for part in ("train", "valid", "test"):
        (tmp_path / f"casino_{part}.json").write_text(json.dumps(dialogues if part == "train" else []))
    before = os.umask(0o022)
    call_script("tools/convert_corpus.py", "casino", tmp_path, tmp_path / "made")
    os.umask(before)
    written = [path for path in (tmp_path / "made").rglob("*") if path.is_file()]
    assert len(written) == 5 and all(path.stat().st_mode & 0o077 == 0 for path in written)


@pytest.mark.parametrize("option", ["report_to=wandb", "log_completions=true", "push_to_hub=true", "hub_token=x"])
def test_trls_own_reports_need_log_text_too(option):
    options = ("train_rl_GELI.py", "--algo", "grpo", "--train", "--trl", option)
    refused = call_script(*options, check=2)
    assert f"--trl {option}" in refused.stderr and refused.stderr.count("\n") == 1
