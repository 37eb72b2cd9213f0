"""What the commands encode: nothing twice, in batches as large as asked for, and compiled if asked for."""

import json
import shutil
from functools import partial

import pytest
import torch
from conftest import call_script
from no_pictures import without_pictures

from geli.nets.encoder import TurnEncoder, load_encoder
from geli.nets.features import encoder_fingerprint


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without wandb and pictures."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    without_pictures(monkeypatch)


@pytest.fixture
def command(sample, tiny, tmp_path):
    """Runs a reward stage on a few conversations."""
    options = ["--data_dir", sample, "--output_dir", tmp_path, "--lang_model_path", tiny / "bart", "--context_turns", 2]
    options += ["--train_size", 4, "--epochs", 1]
    return lambda script, *more: call_script(script, *options, *more)


@pytest.fixture
def rows(monkeypatch):
    """(rows, padded tokens) of each forward pass of an encoder."""
    seen, forward = [], TurnEncoder.forward

    def watch(self, input_ids, attention_mask, **more):
        seen.append((len(input_ids), input_ids.numel()))
        return forward(self, input_ids, attention_mask, **more)

    monkeypatch.setattr(TurnEncoder, "forward", watch)
    return seen


def test_stage_2_encodes_nothing_twice_unless_asked_to(command, rows, tmp_path):
    encoded = {}
    for run, more in {
        "first": [],
        "second": [],
        "other": ["--redist_type", "IRCR", "--learning_rate", 1e-3],
        "without": ["--no_cache"],
    }.items():
        rows.clear()
        command("train_reward_GELI.py", "--train", "--val", "--epochs", 2, "--run_name", run, *more)
        encoded[run] = sum(n for n, _ in rows)
    assert encoded["first"] == encoded["without"] > 0
    assert encoded["second"] == encoded["other"] == 0
    heads = {run: next(tmp_path.glob(f"*/reward1_{run}")).read_bytes() for run in encoded}
    assert heads["first"] == heads["second"] == heads["without"] != heads["other"]
    records = [json.loads(next(tmp_path.glob(f"*/reward1_{run}.json")).read_text()) for run in ("first", "second")]
    assert records[0]["metrics"] == records[1]["metrics"]
    assert sorted((tmp_path / "cache").rglob("*"))
    shutil.rmtree(tmp_path / "cache")
    command("train_reward_GELI.py", "--train", "--run_name", "clean", "--no_cache")
    assert not (tmp_path / "cache").exists()


def test_tokens_per_batch_bounds_what_goes_through_the_encoder_at_once(command, rows):
    command("train_reward_LI_only.py", "--val", "--no_cache", "--tokens_per_batch", 200)
    command("train_reward_GELI.py", "--train", "--no_cache", "--tokens_per_batch", 200)
    assert max(tokens for _, tokens in rows) <= 200
    rows.clear()
    command("train_reward_GELI.py", "--train", "--no_cache")
    assert max(tokens for _, tokens in rows) > 200


@pytest.fixture
def graph_calls(monkeypatch):
    """The calls of what torch.compile has compiled: traced by Dynamo, without the minutes of a code generator."""
    calls = []

    def backend(graph, _):
        def run(*inputs):
            calls.append(len(inputs))
            return graph(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield calls
    torch.compiler.reset()


def test_what_is_compiled_is_what_is_run(tiny, graph_calls, tmp_path):
    plain, compiled = (load_encoder(str(tiny / "bart")).eval() for _ in range(2))
    compiled.compile()
    pairs = plain.tokenize([(" User: hello" * n, "AI: hi") for n in range(1, 9)])
    expected = plain.encode(pairs)
    assert not graph_calls
    torch.testing.assert_close(compiled.encode(pairs), expected, atol=1e-6, rtol=1e-5)
    assert graph_calls
    assert encoder_fingerprint(compiled, "") == encoder_fingerprint(plain, "")
    for name, encoder in (("plain", plain), ("compiled", compiled)):
        encoder.save(tmp_path / name)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "compiled"))
    assert first == second


@pytest.mark.slow
def test_the_compile_option_compiles_the_encoder_in_both_stages(command, graph_calls, tmp_path):
    weights = {}
    for script in ("train_reward_GELI.py", "train_reward_LI_only.py"):
        train = ("--train",) if "GELI" in script else ()
        for run, more in (("plain", ()), ("compiled", ("--compile",))):
            graph_calls.clear()
            command(script, "--no_cache", "--run_name", run, *train, *more)
            assert bool(graph_calls) == (run == "compiled")
            path = next(tmp_path.glob(f"{'baselines' if train else 'SINGLE'}*/reward1_{run}"))
            weights[run] = path.read_bytes().replace(f"lang_model_{run}".encode(), b"")
        if train:  # a frozen encoder in eval mode: the same features, the same head
            assert weights["plain"] == weights["compiled"]
