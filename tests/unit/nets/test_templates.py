"""Texts of chat templates are read as the messages that they were made from, or refused; never as text with markup."""

import pytest
from chat_templates import TEMPLATES, UNKNOWN, render, tokenizer_of
from hypothesis import given
from hypothesis import strategies as st

from geli.nets.forms import read_completion, read_prompt, split_query
from geli.nets.options import INSTRUCTION
from geli.nets.templates import TokenizerTemplate, spoken
from geli.run.errors import UserError

TALK = [
    {"role": "user", "content": "I lost my job."},
    {"role": "assistant", "content": "Oh no."},
    {"role": "user", "content": "Yes.\nToday."},
]
SYSTEM = {"role": "system", "content": "Be kind."}
FOLDS = ("Mistral", "Mistral v3", "Gemma")  # they write the system message into a message of the user
CONTEXT = " User: I lost my job.  AI: Oh no.  User: Yes.\nToday."
MARKS = (
    "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "</s>", "<s>", "<<SYS>>", "<start_of_turn>user", "<end_of_turn>",
    "<|eot_id|>", "<|user|>", "<|assistant|>", "<|end|>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<bos>",
    "<|start_header_id|>user<|end_header_id|>", "<|turn|>", "<|stop|>",
)  # fmt: skip


@pytest.mark.parametrize("family", TEMPLATES)
def test_cases_a_templates_text_is_its_messages(family):
    text = render(TEMPLATES[family], TALK, add_generation_prompt=True)
    prompt = read_prompt(text, 10)
    assert prompt == read_prompt(TALK, 10) and prompt.context == CONTEXT
    assert read_prompt(text.removeprefix("<s>").removeprefix("<bos>"), 10) == prompt  # trainers strip it or not


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


def test_cases_a_form_that_nobody_knows_is_refused_and_read_by_its_own_tokenizer():
    text = render(UNKNOWN, [SYSTEM, *TALK], add_generation_prompt=True)
    with pytest.raises(UserError, match=r"found '<\|turn\|>': send chat messages, or name the policy's tokenizer"):
        read_prompt(text, 10)
    own = TokenizerTemplate(tokenizer_of(UNKNOWN))
    assert read_prompt(text, 10, own) == read_prompt(TALK, 10)
    assert read_prompt(render(TEMPLATES["Zephyr"], TALK), 10, own) == read_prompt(TALK, 10)  # another's is read, too
    before, response = split_query(f"{text}Why?<|stop|>\n", None, own)
    assert read_prompt(before, 10) == read_prompt(TALK, 10) and read_completion(response).strip() == "Why?"


@pytest.mark.parametrize(
    "text",
    [
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


texts = st.text(st.characters(codec="utf-8", exclude_characters="<>[]|#"), max_size=12)
marked = st.builds("{}{}x{}".format, texts, st.sampled_from(MARKS), texts)
contents = st.one_of(texts, texts, texts, marked)
talks = st.lists(contents, min_size=1, max_size=6).map(
    lambda said: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
)


def reading(prompt, own=None):
    try:
        return read_prompt(prompt, 4, own)
    except UserError:
        return None


@given(st.sampled_from(sorted(TEMPLATES)), st.one_of(st.none(), contents), talks, st.booleans())
def test_cases_random_talks_are_read_as_their_messages_or_refused(family, system, talk, by_own):
    messages = [{"role": "system", "content": system}, *talk] if system is not None else talk
    text = render(TEMPLATES[family], messages, add_generation_prompt=talk[-1]["role"] == "user")
    own = TokenizerTemplate(tokenizer_of(TEMPLATES[family])) if by_own else None
    found = reading(text, own)
    assert found is None or found._replace(text="") == reading(messages)._replace(text="")
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


@pytest.mark.parametrize(
    ("template", "said"),
    [("{{ nothing.at.all }}", "is of no use"), ("Hello", "does not write every message in the same way")],
)
def test_a_template_that_cannot_be_read_back_is_refused(template, said):
    with pytest.raises(UserError, match=f"--tokenizer model: .*{said}"):
        TokenizerTemplate(tokenizer_of(template))
