"""A model in a folder, whose decoding is constrained, and a model on a server."""

import itertools

import pytest
import torch
from conftest import small_model
from small_models import chat_model

from apps.llm_shares.answers import read_reply
from apps.llm_shares.backends import BACKENDS, BackendOptions, FolderBackend
from apps.llm_shares.prompt import HIGHEST
from apps.openai_server import RequestFailed
from experiments.llm_oracle import server
from geli.run.errors import UserError

TEXT = "A conversation of A and B. How good were turns 1 to 3?"


@pytest.fixture(scope="module", params=["plain", "chat"])
def backend(request, sample, tmp_path_factory):
    """A small Llama without and with a chat template."""
    folder = tmp_path_factory.mktemp("model")
    model = small_model("llama", folder / "plain", sample)
    if request.param == "chat":
        model = chat_model(model, folder / "chat")
    return BACKENDS["folder"].make(BackendOptions(folder=str(model), device="cpu"))


@torch.no_grad()
def test_constrained_numbers_are_those_of_whole_forward_passes(backend):
    """A first token that several numbers share is counted by what they make of it: 1 and 10 do."""
    reply = backend.ask(TEXT, 2)
    before, expected = backend._encode_request(TEXT), []
    for turn in (1, 2):
        forced, candidates = backend._candidates(turn)
        tree = {}  # what a walk from token to token has to choose from
        for candidate in candidates:
            for place, token in enumerate(candidate):
                tree.setdefault(tuple(candidate[:place]), set()).add(token)
        probabilities = []
        for candidate in candidates:
            p = 1.0
            for place, token in enumerate(candidate):
                choices = sorted(tree[tuple(candidate[:place])])
                line = [*forced, *candidate[:place]]
                logits = backend.model(torch.tensor([[*before, *line]])).logits[0, -1].float()
                p *= logits[choices].softmax(0)[choices.index(token)].item() if len(choices) > 1 else 1.0
            probabilities.append(p)
        assert sum(probabilities) == pytest.approx(1)
        expected.append(sum(number * p for number, p in enumerate(probabilities)))
        before += [*forced, *candidates[max(range(11), key=probabilities.__getitem__)]]
    found = [float(line.partition(": ")[2]) for line in reply.text.splitlines()]
    assert found == pytest.approx(expected, abs=2e-4)
    assert [line.partition(":")[0] for line in reply.text.splitlines()] == ["1", "2"]


def test_every_turn_has_one_number_and_the_same_each_time(backend):
    first, second = backend.ask(TEXT, 12), backend.ask(TEXT, 12)
    lines = first.text.splitlines()
    assert [int(line.partition(":")[0]) for line in lines] == list(range(1, 13))
    assert all(0 <= float(line.partition(": ")[2]) <= HIGHEST for line in lines)
    assert first.text == second.text and first[1:3] == second[1:3] and first.tokens_out >= 12 * 3
    assert backend.ask(f"{TEXT} Really?", 12).text != first.text


def test_candidates_are_told_apart_whatever_the_tokenizer_does(backend):
    for turn in (1, 10, 137):
        forced, candidates = backend._candidates(turn)
        lines = [backend.tokenizer.decode([*forced, *candidate]).strip() for candidate in candidates]
        assert lines == [f"{turn}: {number}" for number in range(HIGHEST + 1)]
        assert not any(b[: len(a)] == a for a, b in itertools.permutations(candidates, 2))


def test_a_request_that_is_too_long_for_the_model_says_what_to_do(backend):
    with pytest.raises(UserError, match="room for 256: give a smaller --window"):
        backend.ask(TEXT, 40)


def test_another_model_has_another_identity(backend, sample, tmp_path):
    other = FolderBackend(BackendOptions(folder=str(small_model("gpt2", tmp_path, sample)), device="cpu"))
    assert other.identity != backend.identity


def test_a_server_is_asked_at_temperature_0_with_the_seed(monkeypatch):
    pytest.importorskip("openai", reason="needs openai (apps/llm_shares/requirements.txt)")
    monkeypatch.setenv("LLM_API_KEY", "sk-secret")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    with server(lambda text: "1: 5" if text == TEXT else 500) as (url, asked):
        backend = BACKENDS["url"].make(BackendOptions(url=url, model="m", seed=7, max_tokens=33))
        reply = backend.ask(TEXT, 1)
        with pytest.raises(RequestFailed, match="HTTP 500"):
            backend.ask("else", 1)
    assert (reply.text, reply.tokens_in, reply.tokens_out) == ("1: 5", len(TEXT) // 4, 1)
    assert asked[0] == {
        "model": "m", "messages": [{"role": "user", "content": TEXT}], "temperature": 0, "seed": 7, "max_tokens": 33
    }  # fmt: skip
    assert backend.identity == ["url", "m", 7, 33, None] and backend.where == url[:-3]


@pytest.mark.parametrize("name", ["json_schema", "json_object"])
def test_a_server_can_be_made_to_reply_in_json_with_one_number_for_each_turn(name):
    pytest.importorskip("openai", reason="needs openai (apps/llm_shares/requirements.txt)")
    with server(lambda _: '{"1": 5, "2": 10}') as (url, asked):
        backend = BACKENDS["url"].make(BackendOptions(url=url, model="m", schema=name))
        assert read_reply(backend.ask(TEXT, 2).text, 2).problems == () and backend.form == "json"
    sent = asked[0]["response_format"]
    schema = sent["json_schema"]["schema"] if name == "json_schema" else sent["schema"]
    assert sent["type"] == name and schema["required"] == ["1", "2"] == list(schema["properties"])
    assert schema["properties"]["2"]["enum"] == list(range(HIGHEST + 1)) and not schema["additionalProperties"]
    free = BACKENDS["url"].make(BackendOptions(url=url, model="m"))
    assert free.identity != backend.identity and free.form == "lines"
