"""Prompts and completions in every form are read as the state and the response that they were made from."""

import pytest

from geli.data.messages import INSTRUCTION
from geli.nets.forms import prompt_of_turns, read_completion, read_messages, read_prompt
from geli.nets.prompts import prompt_text
from geli.run.errors import UserError

TURNS = [(False, "I lost my job."), (True, "Oh no."), (False, "Yes.\nToday.")]
CONTEXT = " User: I lost my job.  AI: Oh no.  User: Yes.\nToday."
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " I lost my job. "},
    {"role": "assistant", "content": "Oh no."},
    {"role": "user", "content": "Yes.\nToday."},
]
CHATML = (
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nI lost my job.<|im_end|>\n"
    "<|im_start|>assistant\nOh no.<|im_end|>\n<|im_start|>user\nYes.\nToday.<|im_end|>\n<|im_start|>assistant\n"
)
LLAMA_3 = "<|begin_of_text|>" + "".join(
    f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n{message['content'].strip()}<|eot_id|>"
    for message in MESSAGES
)
LLAMA_3 += "<|start_header_id|>assistant<|end_header_id|>\n\n"
PUBLISHED = prompt_text(CONTEXT)
OTHER_INSTRUCTION = f"Speak nicely.\nUser: {CONTEXT.removeprefix(' User: ')} AI:"


@pytest.mark.parametrize("form", [MESSAGES, CHATML, LLAMA_3, PUBLISHED, OTHER_INSTRUCTION, f"{PUBLISHED} "])
def test_every_form_is_the_same_state(form):
    prompt = read_prompt(form, 10)
    assert prompt.context == CONTEXT and list(prompt.turns) == TURNS
    assert prompt.trajectory == ((" User: I lost my job.", "AI: Oh no."), (CONTEXT, "")) and prompt.position == 1


def test_the_published_form_is_as_stage_3_writes_it():
    assert f"{INSTRUCTION} User: I lost my job.  AI: Oh no.  User: Yes.\nToday. AI:" == PUBLISHED
    assert read_prompt(PUBLISHED, 1).context == CONTEXT  # such a text has been cut already
    assert read_prompt(MESSAGES, 1).context == " User: Yes.\nToday."
    assert read_prompt(prompt_text(""), 4).context == "" == prompt_of_turns([], 4).context


@pytest.mark.parametrize("text", ["Hello!", "Tell me what AI: means.", "Continue this. AI:"])
def test_any_other_text_is_a_message_of_the_user(text):
    assert read_prompt(f" {text}\n", 10).context == f" User: {text}"


def test_an_agents_turn_that_is_to_be_continued_is_in_the_state():
    assert read_prompt([*MESSAGES[:3]], 10).context == " User: I lost my job.  AI: Oh no."
    assert read_prompt(CHATML.split("<|im_end|>\n<|im_start|>user\nYes")[0], 10).context.endswith("  AI: Oh no.")


def test_completions_are_texts_or_messages():
    assert read_completion("Why? User: no") == "Why? User: no"
    assert read_completion([{"role": "assistant", "content": " Why? "}]) == "Why?"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ({"role": "user"}, "expected a list of chat messages, found dict"),
        ("Hello", "expected a list of chat messages, found str"),
        (["Hello"], "message 0: .* found something else"),
        ([*MESSAGES, {"role": "tool", "content": "4"}], "message 4: .* found role 'tool', content of type str"),
        ([{"role": "user", "content": None}], "content of type NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content of type list"),
        ([{"role": ["x"], "content": "a"}], "role"),
    ],
)
def test_other_messages_are_refused(messages, said):
    with pytest.raises(UserError, match=said):
        read_messages(messages)
