"""What is kept on disk is used when it is what was asked for, and never otherwise."""

import json
import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import call_script, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

import cache
import data_utils
from cache import ConversationCache, FeatureCache, encoder_fingerprint
from data_utils import FACES, read_corpus
from models import load_encoder

# ---------------------------------------------------------------------------------------------------------------------
# Conversations


@pytest.fixture
def data(sample, tmp_path) -> Path:
    """A dozen conversations that a test may change, and one that is dropped."""
    folder = tmp_path / "candor"
    for path in sorted(path for path in sample.iterdir() if path.is_dir())[:12]:
        shutil.copytree(path, folder / path.name)
    (folder / "broken").mkdir()
    return folder


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of the folders that were really read."""
    names, read = [], data_utils.read_conversation

    def count(folder, transcript):
        names.append(folder.name)
        return read(folder, transcript)

    monkeypatch.setattr(data_utils, "read_conversation", count)
    return names


def read(data, tmp_path, **options):
    return read_corpus(data, "overall_affect", cache=tmp_path / "cache", **options)


def test_what_was_read_is_read_once_and_is_the_same(data, tmp_path, reads):
    plain = read_corpus(data, "overall_affect")
    reads.clear()
    first, second = read(data, tmp_path), read(data, tmp_path)
    assert len(reads) == 14  # and the one that was dropped, again
    assert plain == first == second
    assert second.dropped.keys() == {"broken"}
    assert all(type(turn.start) is float and type(turn.affect) is int for c in second.conversations for turn in c.turns)


def test_a_changed_file_is_read_again_and_nothing_else_is(data, tmp_path, reads):
    before = read(data, tmp_path)
    name = before.conversations[3].id
    path = data / name / "survey.csv"
    table = pd.read_csv(path)
    table["overall_affect"] = 9
    stat = path.stat()
    table.to_csv(path, index=False)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # not even a file's own time hides the change
    reads.clear()
    after = read(data, tmp_path)
    assert set(reads) == {name, "broken"}
    assert {t.score for t in after.trajectories[name]} == {90}
    shutil.rmtree(data / name)
    shutil.copytree(data / before.conversations[0].id, data / "new")
    reads.clear()
    assert {c.id for c in read(data, tmp_path).conversations} == {c.id for c in before.conversations} - {name} | {"new"}
    assert set(reads) == {"new", "broken"}
    reads.clear()
    read(data, tmp_path)
    assert reads == ["broken"]


def test_another_transcript_or_data_folder_has_a_cache_of_its_own(data, tmp_path, reads):
    read(data, tmp_path)
    for path in data.glob("*/transcription/transcript_cliffhanger.csv"):
        shutil.copy(path, path.with_name("transcript_audiophile.csv"))
    shutil.copytree(data, tmp_path / "copy")
    reads.clear()
    read(data, tmp_path, transcript="audiophile")
    read(tmp_path / "copy", tmp_path)
    assert len(reads) == 26


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "other code"])
def test_a_damaged_or_stale_cache_is_not_used(data, tmp_path, reads, damage, capsys, monkeypatch):
    right = read(data, tmp_path)
    path = next((tmp_path / "cache").glob("*.cache"))
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 3] ^= 0xFF
    elif damage == "empty":
        content = b""
    elif damage == "text":
        content = b"hello"
    path.write_bytes(content)
    if damage == "other code":
        (tmp_path / "other.py").write_text("# another version")
        monkeypatch.setattr(data_utils, "__file__", str(tmp_path / "other.py"))
    reads.clear()
    assert read(data, tmp_path) == right
    assert len(reads) == 13
    assert ("is not used" in capsys.readouterr().out) == (damage != "other code")
    reads.clear()
    assert read(data, tmp_path) == right and reads == ["broken"]  # and it has been replaced


def test_the_cache_of_conversations_is_for_its_owner_only(data, tmp_path):
    read(data, tmp_path)
    assert [path.stat().st_mode & 0o077 for path in (tmp_path / "cache").iterdir()] == [0]


def test_many_folders_are_read_in_several_processes_with_the_same_result(data, monkeypatch):
    one = read_corpus(data, "overall_affect")
    monkeypatch.setattr(data_utils, "PARALLEL_FROM", 2)
    monkeypatch.setattr("runs.available_cores", lambda: 2)
    assert read_corpus(data, "overall_affect") == one


def _read_in_a_process(data, folder, queue):
    queue.put(len(read_corpus(data, "overall_affect", cache=folder).conversations))


def test_runs_at_the_same_time_do_not_disturb_each_other(data, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (data, tmp_path / "cache", queue)
    processes = [context.Process(target=_read_in_a_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == [12] * 3
    for process in processes:
        process.join()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".cache"]
    kept = ConversationCache(tmp_path / "cache", data, "cliffhanger")
    assert kept.get(data / "broken") is None and len(kept._rows) == 12


# ---------------------------------------------------------------------------------------------------------------------
# The fast way to read faces

CELLS = st.sampled_from(["0.5", "0.25", "1e-3", "", "nan", "inf", "x", " 0.1", "-1"])
TIMES = st.sampled_from(["0 days 00:00:01", "0 days 00:01:07.5", "3", "2.5", "", "x", "1 days 00:00:00", "-1"])
USERS = st.sampled_from(["u", "v", " u", "", "NA", '"u"', '"a,b"'])
ROWS = st.lists(st.tuples(USERS, TIMES, st.lists(CELLS, min_size=8, max_size=8)), max_size=12)


@settings(max_examples=150, deadline=None)
@given(ROWS, st.sampled_from(["\n", "\r\n"]), st.sampled_from(["", "\ufeff"]))
def test_the_fast_reader_agrees_with_the_careful_one(tmp_path_factory, rows, newline, start):
    header = ",".join(["frame", "user_id", "timedelta", *(f"prob_face_{face}" for face in FACES)])
    lines = [header, *(",".join(["0", user, time, *cells]) for user, time, cells in rows)]
    path = tmp_path_factory.mktemp("faces") / "audio_video_features.csv"
    path.write_bytes((start + newline.join(lines) + newline).encode())
    names = [f"prob_face_{face}" for face in FACES]
    fast, careful = data_utils._fast_faces(path, names), data_utils._careful_faces(path, names)
    if fast is None:
        return
    for a, b in zip(
        (fast[0], data_utils._seconds(fast[1])), (careful[0], data_utils._seconds(careful[1])), strict=True
    ):
        assert list(a) == pytest.approx(list(b), nan_ok=True) if a.dtype == float else list(a) == list(b)
    lost = np.isinf(fast[2])  # no more of a probability than an empty cell, which is what the careful one makes of it
    np.testing.assert_array_equal(np.where(lost, np.nan, fast[2]), careful[2])


def test_the_fast_reader_is_the_one_that_reads_sound_files(sample):
    path = next(sample.glob("*/audio_video_features.csv"))
    assert data_utils._fast_faces(path, [f"prob_face_{face}" for face in FACES]) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Features


@pytest.fixture(scope="module")
def encoder(tiny):
    return load_encoder(str(tiny / "bart")).eval()


TEXTS = [(" User: hello", f"AI: answer number {n % 7}") for n in range(20)]


class Counted:
    """An encoder that counts the pairs it encodes."""

    def __init__(self, encoder):
        self.encoder, self.pairs = encoder, 0

    def __call__(self, pairs, on_batch):
        self.pairs += len(pairs)
        return self.encoder.encode(pairs, on_batch=on_batch)


def test_each_distinct_turn_is_encoded_once_ever(encoder, tmp_path):
    pairs, encode = encoder.tokenize(TEXTS), Counted(encoder)
    key = encoder_fingerprint(encoder, "cpu no")
    first = FeatureCache(tmp_path, key).encode(pairs, encode)
    assert encode.pairs == 7
    torch.testing.assert_close(first, encoder.encode(pairs), atol=2e-6, rtol=1e-5)
    again = FeatureCache(tmp_path, key)
    assert torch.equal(again.encode(pairs[::-1], encode), first.flip(0)) and encode.pairs == 7
    again.encode(encoder.tokenize([*TEXTS, ("", "AI: new")]), encode)
    assert encode.pairs == 8
    FeatureCache(tmp_path, key).encode(encoder.tokenize([("", "AI: new")]), encode)
    assert encode.pairs == 8


def test_other_weights_text_cuts_or_numerics_are_other_features(encoder, tiny, tmp_path):
    key = encoder_fingerprint(encoder, "cpu no")
    assert key == encoder_fingerprint(load_encoder(str(tiny / "bart")), "cpu no")
    assert key != encoder_fingerprint(encoder, "cpu bf16")
    other = load_encoder(str(tiny / "bart"))
    with torch.no_grad():
        next(other.encoder.parameters()).view(-1)[0] += 1e-6
    assert key != encoder_fingerprint(other, "cpu no")
    encode = Counted(encoder)
    FeatureCache(tmp_path, key).encode(encoder.tokenize(TEXTS), encode)
    cut = load_encoder(str(tiny / "bart"), max_length=6).tokenize(TEXTS)  # their last tokens: all seven alike
    FeatureCache(tmp_path, key).encode(cut, encode)
    assert encode.pairs > 7


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "other encoder"])
def test_damaged_features_are_not_used(encoder, tmp_path, damage, capsys):
    key, pairs = encoder_fingerprint(encoder, "cpu no"), encoder.tokenize(TEXTS)
    encode = Counted(encoder)
    right = FeatureCache(tmp_path, key).encode(pairs, encode)
    path = next((tmp_path / key).iterdir())
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
    elif damage == "other encoder":  # a file in the wrong place
        (tmp_path / "x").mkdir()
        shutil.move(path, tmp_path / "x" / path.name)
        key = "x"
    else:
        content = content[:-7] if damage == "cut" else b"hello"
    if damage != "other encoder":
        path.write_bytes(content)
    again = FeatureCache(tmp_path, key).encode(pairs, encode)
    assert encode.pairs == 14 and torch.equal(again, right)
    assert "is not used" in capsys.readouterr().out


def test_a_killed_run_keeps_what_it_had_encoded(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FLUSH_SECONDS", 0)
    key, pairs = encoder_fingerprint(encoder, "cpu no"), encoder.tokenize(TEXTS)

    def dies(pairs, on_batch):
        on_batch(np.arange(3), encoder.encode(pairs[:3]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path, key).encode(pairs, dies)
    (tmp_path / key / ".torn.1.tmp.safetensors").write_bytes(b"half a file")
    encode = Counted(encoder)
    FeatureCache(tmp_path, key).encode(pairs, encode)
    assert encode.pairs == 4


def test_writers_at_the_same_time_do_not_disturb_each_other(encoder, tmp_path):
    key, pairs = encoder_fingerprint(encoder, "cpu no"), encoder.tokenize(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: FeatureCache(tmp_path, key).encode(pairs, Counted(encoder)), range(4)))
    assert all(torch.allclose(part, found[0], atol=2e-6) for part in found)
    encode = Counted(encoder)
    FeatureCache(tmp_path, key).encode(pairs, encode)
    assert encode.pairs == 0


def test_stage_2_encodes_nothing_twice_unless_asked_to(sample, tiny, tmp_path, monkeypatch):
    encoded = []
    encode = type(load_encoder(str(tiny / "bart"))).encode

    def count(self, pairs, *args, **kwargs):
        encoded.append(len(pairs))
        return encode(self, pairs, *args, **kwargs)

    monkeypatch.setattr("models.TurnEncoder.encode", count)
    options = ["--data_dir", sample, "--output_dir", tmp_path, "--lang_model_path", tiny / "bart", "--context_turns", 2]
    options += ["--train", "--val", "--train_size", 6, "--epochs", 2]
    results = []
    for run, more in {
        "first": [],
        "second": [],
        "other": ["--redist_type", "IRCR", "--learning_rate", 1e-3],
        "without": ["--no_cache"],
    }.items():
        encoded.clear()
        call_script("train_reward_GELI.py", *options, "--run_name", run, *more)
        results.append(sum(encoded))
    assert results[0] == results[3] > 0 and results[1:3] == [0, 0]
    records = [json.loads(next(tmp_path.glob(f"*/reward1_{run}.json")).read_text()) for run in ("first", "second")]
    assert records[0]["metrics"] == records[1]["metrics"]
    before = sorted((tmp_path / "cache").rglob("*"))
    shutil.rmtree(tmp_path / "cache")
    call_script("train_reward_GELI.py", *options, "--run_name", "clean", "--no_cache")
    assert before and not (tmp_path / "cache").exists()


def test_tokens_per_batch_bounds_what_goes_through_the_encoder_at_once(sample, tiny, tmp_path, monkeypatch):
    seen = []
    forward = type(load_encoder(str(tiny / "bart"))).forward

    def watch(self, input_ids, attention_mask, **more):
        seen.append(input_ids.numel())
        return forward(self, input_ids, attention_mask, **more)

    monkeypatch.setattr("models.TurnEncoder.forward", watch)
    options = ["--data_dir", sample, "--output_dir", tmp_path, "--lang_model_path", tiny / "bart", "--context_turns", 2]
    options += ["--train_size", 4, "--epochs", 1, "--no_cache"]
    call_script("train_reward_LI_only.py", *options, "--val", "--tokens_per_batch", 200)
    call_script("train_reward_GELI.py", *options, "--train", "--tokens_per_batch", 200)
    assert max(seen) <= 200
    seen.clear()
    call_script("train_reward_GELI.py", *options, "--train")
    assert max(seen) > 200


def test_two_adapters_that_differ_in_a_setting_alone_are_two_encoders(sample, tmp_path):
    folder = small_model("llama-encoder", tmp_path / "llama", sample)
    one, other = (load_encoder(str(folder), adapt=True) for _ in range(2))
    other.load_state_dict(one.state_dict())
    assert encoder_fingerprint(one, "cpu no") == encoder_fingerprint(other, "cpu no")
    other.model.peft_config["default"].lora_alpha = 64
    assert encoder_fingerprint(one, "cpu no") != encoder_fingerprint(other, "cpu no")


def test_the_compile_option_compiles_the_encoder(sample, tiny, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: compiled.append(module) or module)
    options = ["--data_dir", sample, "--output_dir", tmp_path, "--lang_model_path", tiny / "bart", "--context_turns", 2]
    options += ["--train_size", 4, "--epochs", 1, "--train", "--no_cache"]
    call_script("train_reward_GELI.py", *options)
    assert not compiled
    call_script("train_reward_GELI.py", *options, "--compile")
    assert len(compiled) == 1


def test_compile_runs_the_encoder_through_torch_compile(encoder, tiny, monkeypatch):
    compiled = []

    def compile_(module, **options):
        compiled.append((module, options))
        return module

    monkeypatch.setattr(torch, "compile", compile_)
    other = load_encoder(str(tiny / "bart")).eval()
    other.compile()
    assert compiled == [(other.encoder, {"dynamic": True})]
    pairs = other.tokenize(TEXTS)
    assert torch.equal(other.encode(pairs), encoder.encode(pairs))
