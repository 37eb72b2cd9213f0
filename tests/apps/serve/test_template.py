"""Prompts of any chat template are read by the tokenizer that has it."""

import pytest
from chat_templates import SYSTEM, TALK, TEMPLATES, UNKNOWN, contents, reading, render, talks, tokenizer_of
from hypothesis import given
from hypothesis import strategies as st

from apps.serve.queries import split_query
from apps.serve.template import TokenizerTemplate
from geli.nets.forms import read_completion, read_prompt
from geli.run.errors import UserError

OWN = {name: TokenizerTemplate(tokenizer_of(text)) for name, text in {**TEMPLATES, "unknown": UNKNOWN}.items()}


def test_cases_a_form_that_nobody_knows_is_read_by_its_own_tokenizer():
    text, own = render(UNKNOWN, [SYSTEM, *TALK], add_generation_prompt=True), OWN["unknown"]
    with pytest.raises(UserError, match=r"found '<\|turn\|>': send chat messages, or name the policy's tokenizer"):
        read_prompt(text, 10)
    assert read_prompt(text, 10, own) == read_prompt(TALK, 10)
    assert read_prompt(render(TEMPLATES["Zephyr"], TALK), 10, own) == read_prompt(TALK, 10)  # another's is read, too
    before, response = split_query(f"{text}Why?<|stop|>\n", None, own)
    assert read_prompt(before, 10) == read_prompt(TALK, 10) and read_completion(response).strip() == "Why?"


def test_cases_a_template_that_writes_system_messages_apart_leaves_no_doubt():
    talk = [{"role": "user", "content": "One.\n\nTwo."}]
    text = render(TEMPLATES["Llama-2"], talk)
    assert reading(text) is None and reading(text, OWN["Llama-2"]) == reading(talk)
    assert reading(render(TEMPLATES["Gemma"], talk), OWN["Gemma"]) is None


def test_cases_a_tokenizers_special_tokens_are_markup():
    tokenizer = tokenizer_of(UNKNOWN.replace("<|turn|>", "(turn)").replace("<|stop|>", "(stop)"), ["(turn)", "(stop)"])
    own = TokenizerTemplate(tokenizer)
    text = render(UNKNOWN, TALK).replace("<|turn|>", "(turn)").replace("<|stop|>", "(stop)")
    assert reading(text, own) == reading(TALK) and reading(f"more{text}", own) is None


@given(st.sampled_from(sorted(OWN)), st.one_of(st.none(), contents), talks)
def test_cases_random_talks_are_read_as_their_messages_or_refused(family, system, talk):
    messages = [{"role": "system", "content": system}, *talk] if system is not None else talk
    text = render({**TEMPLATES, "unknown": UNKNOWN}[family], messages, add_generation_prompt=talk[-1]["role"] == "user")
    found = reading(text, OWN[family])
    assert found is None or found == reading(messages)


@pytest.mark.parametrize(
    ("template", "said"),
    [("{{ nothing.at.all }}", "is of no use"), ("Hello", "does not write every message in the same way")],
)
def test_a_template_that_cannot_be_read_back_is_refused(template, said):
    with pytest.raises(UserError, match=f"--tokenizer model: .*{said}"):
        TokenizerTemplate(tokenizer_of(template))
