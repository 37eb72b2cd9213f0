"""Texts of chat templates are read as the messages that they were made from, or refused; never as text with markup."""

import pytest
from chat_templates import CONTEXT, FOLDS, MARKS, SYSTEM, TALK, TEMPLATES, UNKNOWN, contents, reading, render, talks
from hypothesis import given
from hypothesis import strategies as st

from geli.data.messages import INSTRUCTION
from geli.nets.forms import read_completion, read_prompt
from geli.nets.templates import spoken
from geli.run.errors import UserError


@pytest.mark.parametrize("family", TEMPLATES)
def test_cases_a_templates_text_is_its_messages(family):
    text = render(TEMPLATES[family], TALK, add_generation_prompt=True)
    prompt = read_prompt(text, 10)
    assert prompt == read_prompt(TALK, 10) and prompt.context == CONTEXT
    for begin in ("<s>", "<bos>"):  # trainers leave it out, write it twice, and pad texts
        assert read_prompt(text.removeprefix(begin), 10) == prompt
    assert read_prompt(f"<|endoftext|></s><s>{text}", 10) == prompt


@pytest.mark.parametrize("family", TEMPLATES)
def test_cases_a_system_message_is_no_speech(family):
    text = render(TEMPLATES[family], [SYSTEM, *TALK], add_generation_prompt=True)
    if family in FOLDS:
        with pytest.raises(UserError, match="system messages into the user's"):
            read_prompt(text, 10)
        text = render(TEMPLATES[family], [{**SYSTEM, "content": INSTRUCTION}, *TALK[:1]])
        assert read_prompt(text, 10) == read_prompt(TALK[:1], 10)
    else:
        assert read_prompt(text, 10) == read_prompt(TALK, 10)


@pytest.mark.parametrize(
    "text",
    [
        render(UNKNOWN, TALK),
        "USER: Hello ASSISTANT:",
        "Human: Hello\n\nAssistant:",
        "### Instruction:\nHello\n\n### Response:\n",
        "user\nHello\nassistant\n",  # ChatML without its special tokens
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hello<|END_OF_TURN_TOKEN|>",
        "[|user|]Hello\n[|assistant|]",
        "<|turn>user\nHello<turn|>\n<|turn>model\n",
        "<start_of_role>user<end_of_role>Hello",
        "<extra_id_1>User\nHello\n<extra_id_1>Assistant\n",
        "st my job.<|im_end|>\n<|im_start|>assistant\n",  # cut on the left
        "<|im_start|>user\nHello<|im_start|>assistant\n",
        "<|im_start|>tool\n4<|im_end|>\n",
        "[INST] Hello [/INST] Hi [INST] Bye [/INST]",
        [{"role": "user", "content": "<s>[INST] Hello [/INST]"}],
    ],
)
def test_cases_other_markup_is_refused(text):
    with pytest.raises(UserError):
        read_prompt(text, 10)


def test_words_that_are_no_markup_are_read():
    for text in ("model", "I [laughs] like <3 and a | b > c", "What does AI: mean?", "Is x<y or y>z?", "[MUSIC] hi"):
        assert read_prompt(text, 10).context == f" User: {text}"


@given(st.sampled_from(sorted(TEMPLATES)), st.one_of(st.none(), contents), talks)
def test_cases_random_talks_are_read_as_their_messages_or_refused(family, system, talk):
    messages = [{"role": "system", "content": system}, *talk] if system is not None else talk
    text = render(TEMPLATES[family], messages, add_generation_prompt=talk[-1]["role"] == "user")
    found = reading(text)
    assert found is None or found == reading(messages)
    if system is None and not any(mark in text["content"] for text in talk for mark in (*MARKS, "\n\n")):
        assert found is not None


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("<think>\nThe user is sad.\n</think>\n\nI am so sorry.", "I am so sorry."),
        ("The user is sad.</think>I am so sorry.", "I am so sorry."),
        ("<think>The user is", ""),
        ("Well. <think>The user is", "Well."),
        ("[THINK]sad[/THINK]Oh.", "Oh."),
        ("<|channel|>analysis<|message|>sad<|end|><|start|>assistant<|channel|>final<|message|>Oh.", "Oh."),
        ("Oh.", "Oh."),
    ],
)
def test_cases_thoughts_are_no_speech(reply, said):
    assert spoken(reply).strip() == said and read_completion(reply).strip() == said
    assert read_completion([{"role": "assistant", "content": reply}]) == said


def test_cases_a_thought_that_the_prompt_began_is_no_speech():
    prompt = render(TEMPLATES["DeepSeek-R1"], TALK, add_generation_prompt=True)
    assert prompt.endswith("<think>\n") and read_prompt(prompt, 10).context == CONTEXT
    assert read_completion("The user is sad.</think>Oh.", prompt) == "Oh."
    assert read_completion("The user is sad", prompt) == ""


def test_what_a_policy_wrote_is_cut_at_markup():
    assert read_completion("Oh.<|eot_id|><|start_header_id|>user") == "Oh." == read_completion("Oh.[/INST] and")
    assert read_completion([{"role": "assistant", "content": "Oh.</s>"}]) == "Oh."
