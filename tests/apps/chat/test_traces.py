"""Forgetting a person: what is found, what is removed, and what is left alone."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import small_model
from small_models import write_head

from apps.chat.traces import find_traces, remove
from data_utils import read_corpus
from geli.data.cache import ConversationCache
from geli.data.chats import open_chats
from geli.run.errors import UserError
from tools.writer import write_conversation

SAID = "I have never told anybody of my green tortoise"


def write(folder: Path, *users: str, text: str = SAID) -> Path:
    """A conversation of two people."""
    turns = [(users[0], 0.0, 4.0, text), (users[1], 5.0, 9.0, "Oh, really?")]
    write_conversation(folder, turns, [], {users[0]: {"overall_affect": 5}})
    return folder


@pytest.fixture
def data(tmp_path):
    """Conversations of ann, of others, and one of ann that was broken off."""
    folder = tmp_path / "talks"
    for name, users in {"c-1": ("ann", "policy:x"), "c-2": ("bob", "policy:x"), "c-3": ("carl", "ann")}.items():
        write(folder / name, *users)
    write(folder / ".broken_off" / "c-4", "ann", "policy:x")
    (tmp_path / "runs").mkdir()
    return folder


@pytest.fixture
def traces_of(data):
    return lambda user="ann": find_traces(user, [data], data.parent / "runs")


def names(paths) -> set[str]:
    return {path.name for path in paths}


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


def test_a_persons_conversations_are_found_and_removed_and_no_others(data, traces_of):
    traces = traces_of()
    assert names(traces.folders) == traces.ids == {"c-1", "c-3", "c-4"} and traces.unclear == {}
    before = (data / "c-2" / "survey.csv").read_bytes()
    remove(traces)
    assert names(data.iterdir()) == {"c-2", ".broken_off"} and names((data / ".broken_off").iterdir()) == set()
    assert (data / "c-2" / "survey.csv").read_bytes() == before
    with pytest.raises(UserError, match=r"ann: expected an id that speaks .*none in 1 conversations"):
        traces_of()


def test_an_id_is_a_whole_one(data, traces_of):
    write(data / "c-5", "anna", "mary ann", text="ann, ann")
    assert "c-5" not in traces_of().ids and traces_of("anna").ids == {"c-5"}


def test_conversations_that_readers_drop_are_found_too(data, traces_of):
    (data / "c-1" / "survey.csv").unlink()
    (data / "c-1" / "transcription" / "transcript_cliffhanger.csv").write_bytes(b'speaker,utterance\nann,"\xff\n')
    (data / "c-3" / "transcription" / "transcript_cliffhanger.csv").unlink()
    for name in ("audiophile", "backbiter"):
        (data / "c-1" / "transcription" / f"transcript_{name}.csv").unlink()
    (data / "c-6" / "transcription").mkdir(parents=True)
    (data / "c-6" / "survey.csv").write_text("\ufeffuser_id,x\n ann ,1\n")
    backchannels = "speaker,utterance,backchannel_speaker\nbob,hello,ann\n"
    write(data / "c-7", "bob", "dan")
    (data / "c-7" / "transcription" / "transcript_backbiter.csv").write_text(backchannels)
    assert traces_of().ids == {"c-1", "c-3", "c-4", "c-6", "c-7"}


def test_half_written_ones_are_found_and_other_hidden_folders_are_not(data, traces_of):
    half = write(data / ".c-8.0123456789abcdef.tmp", "ann", "bob")
    write(data / ".git", "ann", "bob")
    traces = traces_of()
    assert half in traces.folders and "c-8" in traces.ids and ".git" not in names(traces.folders)
    remove(traces)
    assert names(data.iterdir()) == {"c-2", ".broken_off", ".git"}


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_links_and_unreadable_files_are_named_and_left(data, traces_of):
    elsewhere = write(data.parent / "elsewhere", "ann", "bob")
    (data / "c-9").symlink_to(elsewhere)
    write(data / "c-10", "dan", "bob")
    os.mkfifo(data / "c-10" / "transcription" / "x.csv")
    (data / "c-10" / "transcription" / "y.csv").symlink_to("/proc/self/mem")  # a file that cannot be read
    traces = traces_of()
    assert "a link to a conversation of that person" in traces.unclear[data / "c-9"]
    assert "cannot be read: " in traces.unclear[data / "c-10" / "transcription" / "y.csv"]
    remove(traces)
    assert (elsewhere / "survey.csv").is_file() and (data / "c-9").is_symlink() and (data / "c-10").is_dir()


def test_links_are_named_even_if_there_is_nothing_else(data, traces_of):
    (data / "c-9").symlink_to(write(data.parent / "elsewhere", "eve", "bob"))
    with pytest.raises(UserError, match=r"found none .*c-9: a link to a conversation of that person"):
        traces_of("eve")


def test_a_policy_is_not_forgotten(traces_of):
    with pytest.raises(UserError, match="policy:x: expected the id of a person"):
        traces_of("policy:x")


def test_missing_folders_are_named(data, tmp_path):
    with pytest.raises(UserError, match="nowhere: expected a folder"):
        find_traces("ann", [tmp_path / "nowhere"], tmp_path / "runs")


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.jsonl.gz"])
def test_a_persons_chats_are_emptied_in_their_file_and_the_others_keep_their_lines(name, tmp_path):
    def chat(first, second, **more):
        return {"messages": [{"role": first, "content": SAID}, {"role": second, "content": "Oh"}], **more}

    lines = [
        {"format": "rated-chats", "rating_range": [1, 5]}, chat("ann", "bob", ratings={"bob": 4}),
        chat("user", "assistant"),
        chat("bob", "ann ", id="x"), chat("user", "assistant", id="c-9", rating=3),
        chat("carl", "dan", ratings={"dan": 2}),
    ]  # fmt: skip
    file, runs = tmp_path / name, tmp_path / "runs"
    content = [*map(json.dumps, lines), '{"role": "ann']
    with open_chats(file, "wb") as opened:
        opened.write("\n".join(content).encode())
    file.chmod(0o640)
    (runs / "cache").mkdir(parents=True)
    read_corpus(file, "overall_affect", cache=runs / "cache")
    traces = find_traces("ann", [file], runs)
    assert traces.lines == {file: [2, 4]} and traces.ids == {f"{name}:2", "x"} and len(traces.caches) == 1
    assert list(traces.unclear) == [Path(f"{file}:7")]
    remove(traces)
    with open_chats(file) as opened:
        assert opened.read().decode().split("\n") == [content[0], "", *content[2:3], "", *content[4:]]
    assert file.stat().st_mode & 0o777 == 0o640 and not traces.caches[0].exists()
    assert find_traces("c-9", [tmp_path / name], runs).lines == {file: [5]}
    with pytest.raises(UserError, match="user: expected a name or a chat's id, found a role"):
        find_traces("user", [file], runs)


# ---------------------------------------------------------------------------------------------------------------------
# Caches


def test_caches_that_hold_them_are_removed_and_others_stay(data, traces_of):
    cache = data.parent / "runs" / "cache"
    write(data.parent / "others" / "c-20", "dan", "bob")
    for folder in (data, data.parent / "others"):
        read_corpus(folder, "overall_affect", cache=cache)
    mine, others = (ConversationCache(cache, folder, "cliffhanger").path for folder in (data, data.parent / "others"))
    (cache / "conversations-0.cache").write_bytes(b"damaged")
    (cache / f".{mine.name}.0123456789abcdef.tmp.cache").touch()
    (cache / "features" / "f").mkdir(parents=True)
    (cache / "smollm2").mkdir()
    remove(traces_of())
    assert names(cache.iterdir()) == {others.name, "smollm2"} and mine != others


def test_what_is_left_in_a_cache_alone_is_found(data, traces_of):
    cache = data.parent / "runs" / "cache"
    read_corpus(data, "overall_affect", cache=cache)
    for name in ("c-1", "c-3", ".broken_off/c-4"):
        (data / name).rename(data.parent / Path(name).name)
    traces = traces_of()
    assert traces.folders == [] and traces.ids == {"c-1", "c-3"} and len(traces.caches) == 1


def test_without_conversations_features_stay(data, traces_of):
    features = data.parent / "runs" / "cache" / "features"
    features.mkdir(parents=True)
    with pytest.raises(UserError):
        traces_of("nobody")
    assert features.is_dir()


# ---------------------------------------------------------------------------------------------------------------------
# What was trained


def write_record(path: Path, **content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def runs(data, tmp_path_factory, sample):
    """Stage 1 trained on c-1, one stage-2 head with its encoder; another one with an encoder of its own."""
    runs = data.parent / "runs"
    stage_1, stage_2 = runs / "SINGLE_INDEX_reward_function_convo", runs / "visual_feedback_baselines_convo"
    stage_1.mkdir()
    trained = small_model("bart", stage_1 / "lang_model_li", sample)
    fresh = shutil.copytree(trained, runs / "bart")
    for folder, run, encoder, training, validation in (
        (stage_1, "li", trained, ["c-1", "c-2"], ["c-9"]),
        (stage_2, "geli", trained, ["c-2"], ["c-9"]),
        (stage_2, "alone", fresh, ["c-2"], ["c-3"]),
        (stage_2, "other", fresh, ["c-2"], ["c-9"]),
    ):
        write_head(folder, encoder, "small_model").rename(folder / f"reward1_{run}")
        write_record(
            folder / f"reward1_{run}.json", metrics={"steps": 3}, training_conversations=training,
            validation_conversations=validation,
        )  # fmt: skip
    return runs


def test_a_head_is_named_whose_own_encoder_was_trained_further_after_it_saw_them(runs, traces_of):
    """As after `--affect_path li --unfreeze`."""
    stage_2 = runs / "visual_feedback_baselines_convo"
    encoder = shutil.copytree(runs / "bart", stage_2 / "lang_model_unfrozen")
    head = write_head(stage_2, encoder, "small_model").rename(stage_2 / "reward1_unfrozen")
    write_record(
        stage_2 / "reward1_unfrozen.json", metrics={"steps": 3}, training_conversations=["c-2"],
        started_from="../SINGLE_INDEX_reward_function_convo/reward1_li",
    )  # fmt: skip
    assert "trained on 1" in traces_of().heads[head]


def test_heads_and_policies_that_saw_them_are_named(data, runs, traces_of):
    stage_2, weights = runs / "visual_feedback_baselines_convo", runs / "rlmf_weights"
    arguments = {"train": True, "data_dir": "elsewhere"}
    with_head = write_record(weights / "GELI_a.json", arguments=arguments, reward_head=str(stage_2 / "reward1_geli"))
    moved = write_record(
        weights / "x.earlier-1" / "GELI_b.json", arguments=arguments,
        reward_head="old/visual_feedback_baselines_convo/reward1_geli",
    )  # fmt: skip
    prompts = write_record(weights / "GELI_c.json", arguments={"train": True, "data_dir": str(data)}, reward_head=None)
    write_record(weights / "GELI_d.json", arguments={"val": True, "data_dir": str(data)}, reward_head=None)
    write_record(weights / "GELI_e.json", arguments=arguments, reward_head=str(stage_2 / "reward1_other"))
    (weights / "GELI_f.json").write_text("{")
    traces = traces_of()
    stays = "of them; stays: train it again"
    assert {path.name: how for path, how in traces.heads.items()} == {
        "reward1_li": f"trained on 1 {stays}",
        "reward1_geli": f"trained on 1 {stays}",
        "reward1_alone": f"validated on 1 {stays}",
    }
    assert set(traces.policies) == {with_head, moved, prompts}
    assert traces.policies[prompts] == f"had prompts from {data}; stays: train it again"
    assert "trained with reward1_geli" in traces.policies[moved]


def test_files_that_name_or_quote_them_are_named(data, runs, traces_of):
    naming = {
        runs / "rlmf_weights" / "GELI_a_responses.csv": f'"… User: {SAID} AI:",x\n',
        runs / "visual_feedback_baselines_convo" / "val_turn_rewards_geli.csv": "c-3,0,carl,ann\n",
        runs / "wandb" / "run" / "t.table.json": json.dumps([f"é {SAID}"]),
    }
    silent = {
        runs / "rlmf_weights" / "GELI_b_responses.csv": "planning c-11 for ann-marie and joann\n",
        runs / "rlmf_weights" / "GELI_b.bin": SAID,
        runs / "notes.csv": SAID,  # not in a folder of the three commands
    }
    for path, text in {**naming, **silent}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    traces = traces_of()
    assert set(traces.mentions) == set(naming)
    remove(traces)
    assert all(path.is_file() for path in naming)
    table = traces.rows()
    assert {"conversation", "reward head", "file of a run"} <= {row["what"] for row in table}


def test_records_that_are_none_are_named(data, runs, traces_of):
    record = runs / "visual_feedback_baselines_convo" / "reward1_broken.json"
    record.write_text("[]")
    head = runs / "visual_feedback_baselines_convo" / "reward1_alone"
    head.write_bytes(b"no head")
    traces = traces_of()
    assert traces.unclear[record] == "not the record of a run" and "expected a reward head" in traces.unclear[head]
