"""Replies as they grow: by hand, then as training samples them; loading a checkpoint as training wrote it."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cases import case
from conftest import small_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import chat_model
from talks import LetterPolicy, write_checkpoint

from apps.chat.partner import Partner, Training, load_partner, so_far, training_of
from geli.nets.options import Adapter
from geli.nets.policy import load_policy
from geli.nets.prompts import Prompt, prompt_text
from geli.rl.rollout import draw_uniforms, rollout
from geli.run.distributed import make_accelerator
from geli.run.errors import UserError

PROMPT = Prompt(prompt_text(" User: hello"), " User: hello", "", turns=((False, "hello"),))


def replies_of(policy, count: int = 1, tuned: bool = True, limit: int = 20, base: bool = False) -> list[list[str]]:
    partner = Partner(policy, "it", tuned)
    return [[*partner.stream(PROMPT, torch.zeros(1, limit), base)] for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# By hand


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" Hello ", "Hello"),
        ("Hello U", "Hello"),  # could become `User:`
        ("Hello User", "Hello"),
        ("Hello Used", "Hello Used"),
        ("Hello User: x AI: y", "Hello"),
        ("I am an A", "I am an"),
        ("I am an AI.", "I am an AI."),
        ("caf\ufffd", "caf"),  # half of a character
        ("", ""),
    ],
)
def test_what_is_shown_of_an_unfinished_reply(text, shown):
    assert so_far(text) == shown


def test_a_reply_grows_letter_by_letter_and_ends_with_the_end_token():
    assert replies_of(LetterPolicy(" Hi.|and more")) == [["H", "Hi", "Hi.", "Hi."]]


def test_a_reply_ends_where_the_next_turn_begins_and_its_beginning_is_never_shown():
    assert replies_of(LetterPolicy("Hm. AI: no")) == [["H", "Hm", "Hm.", "Hm."]]


def test_a_reply_ends_at_the_limit_with_what_was_held_back():
    assert replies_of(LetterPolicy("So USA"), limit=6) == [["S", "So", "So US", "So USA"]]


def test_cases_a_reply_ends_with_any_of_several_end_tokens():
    policy = LetterPolicy("Hi.;and more|")
    policy.ends = (ord("|"), ord(";"))
    assert replies_of(policy) == [["H", "Hi", "Hi.", "Hi."]]
    partner = load_partner(str(case("models/c06_two_ends")), make_accelerator("cpu", "float32"), cache_dir=Path())
    assert [*partner.stream(PROMPT, torch.full((1, 9), 0.5, dtype=torch.float64))][-1] == "Hi."


def test_an_empty_reply_is_yielded_too():
    assert replies_of(LetterPolicy("|", "User:")) == [[""]]


def test_what_a_tokenizer_writes_differently_later_is_shown_at_the_end():
    policy = LetterPolicy("do n't|")
    decode = policy.tokenizer.batch_decode
    policy.tokenizer.batch_decode = lambda rows, **how: [text.replace(" n't", "n't") for text in decode(rows, **how)]
    assert replies_of(policy) == [["d", "do", "do n", "do n'", "don't"]]


def test_the_base_policy_has_no_adapter_and_the_tuned_one_has_it_back():
    policy = LetterPolicy("abc|", "abc", "abc|")
    partner = Partner(policy, "it", tuned=True)
    last = [[*partner.stream(PROMPT, torch.zeros(1, 3), base)][-1] for base in (False, True, False)]
    assert last == ["abc", "...", "abc"]


def test_an_untrained_adapter_is_left_off():
    assert replies_of(LetterPolicy("ab"), tuned=False, limit=2)[0][-1] == ".."


# ---------------------------------------------------------------------------------------------------------------------
# As in training


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def policy(request, sample, tmp_path_factory):
    """A small policy whose adapter makes a difference."""
    torch.manual_seed(0)
    model = small_model(request.param, tmp_path_factory.mktemp("it") / "m", sample)
    policy = load_policy(str(model), Adapter(4, 8), torch.float32)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return policy


def expected(policy, uniforms, base: bool = False) -> str:
    if not base:
        return rollout(policy, [PROMPT], uniforms).texts[0]
    with policy.reference():
        return rollout(policy, [PROMPT], uniforms).texts[0]


def draw(seed: int, limit: int = 16) -> torch.Tensor:
    return draw_uniforms(1, limit, torch.Generator().manual_seed(seed))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), limit=st.integers(1, 24), base=st.booleans())
def test_a_reply_is_what_training_would_sample(policy, seed, limit, base):
    uniforms = draw(seed, limit)
    sampled = expected(policy, uniforms, base)
    texts = [*Partner(policy, "it", tuned=True).stream(PROMPT, uniforms, base)]
    assert texts[-1] == sampled
    assert all(later.startswith(text) for text, later in pairwise(texts))


def test_replies_that_grow_at_the_same_time_are_those_that_grow_alone(policy):
    sampled = [expected(policy, draw(i), base=i % 2 == 1) for i in range(4)]
    partner = Partner(policy, "it", tuned=True)
    streams, last = {i: partner.stream(PROMPT, draw(i), base=i % 2 == 1) for i in range(4)}, {}
    while streams:
        for i, stream in [*streams.items()]:  # one step of each
            text = next(stream, None)
            if text is None:
                del streams[i]
            else:
                last[i] = text
    assert [last[i] for i in range(4)] == sampled


def test_threads_do_not_disturb_each_other(policy):
    sampled = [expected(policy, draw(i), base=i % 2 == 1) for i in range(4)]
    partner = Partner(policy, "it", tuned=True)
    with ThreadPoolExecutor(4) as pool:
        said = pool.map(lambda i: [*partner.stream(PROMPT, draw(i), base=i % 2 == 1)][-1], range(4))
    assert [*said] == sampled


def test_a_reply_that_is_given_up_blocks_nobody():
    partner = Partner(LetterPolicy("abc", "xyz"), "it", tuned=True)
    given_up = partner.stream(PROMPT, torch.zeros(1, 3))
    assert next(given_up) == "a"
    assert [*partner.stream(PROMPT, torch.zeros(1, 3))][-1] == "xyz"


# ---------------------------------------------------------------------------------------------------------------------
# What training recorded


def write_record(folder, **content):
    weights = folder / "rlmf_weights" / "GELI_llama_20"
    weights.mkdir(parents=True)
    (weights.parent / "GELI_llama.json").write_text(json.dumps(content))
    return weights


def test_history_and_head_are_read_from_the_runs_record(tmp_path):
    head = tmp_path / "reward1_a"
    head.touch()
    weights = write_record(tmp_path, arguments={"context_turns": 4}, reward_head=str(head))
    assert training_of(weights) == Training(4, head)


def test_a_head_is_found_where_the_runs_were_moved_to(tmp_path):
    weights = write_record(tmp_path, reward_head="elsewhere/baselines_x/reward1_a")
    assert training_of(weights).reward_head == Path("elsewhere/baselines_x/reward1_a")  # it is missing
    (tmp_path / "baselines_x").mkdir()
    (tmp_path / "baselines_x" / "reward1_a").touch()
    assert training_of(weights).reward_head == tmp_path / "baselines_x" / "reward1_a"


@pytest.mark.parametrize("content", [{}, {"arguments": 3, "reward_head": 4}, {"arguments": {"context_turns": True}}])
def test_what_is_not_recorded_is_not_made_up(content, tmp_path):
    assert training_of(write_record(tmp_path, **content)) == Training()


def test_a_model_has_no_record(tmp_path):
    assert training_of("meta-llama/Llama-2-7b-chat-hf") == training_of(tmp_path / "x_3") == Training()


# ---------------------------------------------------------------------------------------------------------------------
# Loading


@pytest.fixture(scope="module")
def made(sample, tmp_path_factory):
    """(the folder of everything, a checkpoint)."""
    out = tmp_path_factory.mktemp("made")
    return out, write_checkpoint(out, small_model("llama", out / "rlmf_weights" / "GELI_llama_sft", sample))


def load(weights, **options) -> Partner:
    return load_partner(str(weights), make_accelerator("cpu", "float32"), cache_dir=weights / "cache", **options)


def test_a_checkpoint_is_loaded_as_it_was_saved(made):
    out, weights = made
    partner = load(weights)
    assert (partner.name, partner.tuned, partner.context_turns) == ("GELI_llama_2", True, 3)
    assert partner.policy.max_new_tokens == 12
    settings = partner.policy.model.peft_config["default"]
    assert (settings.r, settings.lora_alpha, partner.policy.prompt_format) == (4, 8, "raw")
    bare = load_policy(str(out / "rlmf_weights" / "GELI_llama_sft"), Adapter(4, 8), torch.float32)
    uniforms = draw_uniforms(1, 12, torch.Generator().manual_seed(0))
    assert [*partner.stream(PROMPT, uniforms, base=True)][-1] == expected(bare, uniforms)
    bare.load(weights)
    assert [*partner.stream(PROMPT, uniforms)][-1] == expected(bare, uniforms)


def test_a_checkpoint_reads_prompts_as_in_its_training(made, tmp_path):
    chat = chat_model(made[0] / "rlmf_weights" / "GELI_llama_sft", tmp_path / "chat")
    weights = write_checkpoint(tmp_path, chat, prompt_format="chat")
    assert load(weights).policy.prompt_format == "chat"
    assert load(weights, prompt_format="raw").policy.prompt_format == "raw"


def test_options_come_before_the_record(made):
    assert load(made[1], context_turns=7).context_turns == 7


def test_the_base_model_may_have_moved_with_the_checkpoint(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "moved")
    weights = tmp_path / "moved" / "rlmf_weights" / "GELI_llama_2"
    config = json.loads((weights / "adapter_config.json").read_text())
    (weights / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "/gone/GELI_llama_sft"})
    )
    assert load(weights).tuned
    shutil.move(weights.parent / "GELI_llama_sft", tmp_path / "base")
    with pytest.raises(UserError, match="or name the model with --base_model"):
        load(weights)
    assert load(weights, base_model=str(tmp_path / "base")).tuned


def test_any_model_can_be_talked_to(made):
    partner = load(made[0] / "rlmf_weights" / "GELI_llama_sft")
    assert (partner.name, partner.tuned, partner.context_turns) == ("GELI_llama_sft", False, 10)
    assert partner.policy.max_new_tokens == 128
    with pytest.raises(UserError, match="has no adapter_config"):
        load(made[0] / "rlmf_weights" / "GELI_llama_sft", base_model="x")


@pytest.mark.parametrize("change", [{"use_rslora": True}, {"lora_alpha": -1}, {"lora_alpha": "8"}])
def test_adapters_that_scale_in_another_way_are_refused(change, made, tmp_path):
    weights = shutil.copytree(made[1], tmp_path / "x_1")
    config = json.loads((weights / "adapter_config.json").read_text())
    (weights / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match="expected an adapter of stage 3"):
        load(weights)


def test_a_missing_model_is_named_with_the_option(tmp_path):
    with pytest.raises(
        UserError, match=r"--weights .*/nothing: expected a model's folder, found none; the folders in "
    ):
        load(tmp_path / "nothing")
