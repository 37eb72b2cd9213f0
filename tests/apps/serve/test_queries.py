"""Queries of OpenRLHF are read as the prompt and the response that they were made from."""

import pytest

from apps.serve.queries import split_query
from geli.nets.forms import read_prompt
from geli.nets.prompts import prompt_text
from geli.run.errors import UserError

CONTEXT = " User: I lost my job.  AI: Oh no.  User: Yes.\nToday."
CHATML = (
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nI lost my job.<|im_end|>\n"
    "<|im_start|>assistant\nOh no.<|im_end|>\n<|im_start|>user\nYes.\nToday.<|im_end|>\n<|im_start|>assistant\n"
)
LLAMA_3 = "<|begin_of_text|>" + "".join(
    f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}"
    for role, text in (
        ("system", "Be kind.<|eot_id|>"), ("user", "I lost my job.<|eot_id|>"), ("assistant", "Oh no.<|eot_id|>"),
        ("user", "Yes.\nToday.<|eot_id|>"), ("assistant", ""),
    )
)  # fmt: skip
PUBLISHED = prompt_text(CONTEXT)


@pytest.mark.parametrize(
    ("query", "prompt"),
    [
        (f"{CHATML}Why?<|im_end|>\n", CHATML),
        (f"<s>{CHATML}Why?<|im_end|>\n", CHATML),
        (f"{LLAMA_3}Why?<|eot_id|>", LLAMA_3),
        (f"<s>{PUBLISHED} Why?</s></s>", PUBLISHED),
        (f"{PUBLISHED} Why?", None),
        (f"{CHATML}Why?<|im_end|>", None),
        (f"{LLAMA_3}Why?", None),
        (f"{CHATML}Why?<|im_end|>", f"a part that was cut off{CHATML}"),
    ],
)
def test_a_query_is_its_prompt_and_response(query, prompt):
    before, response = split_query(query, prompt)
    assert read_prompt(before, 10).context == CONTEXT and response.strip() == "Why?"


@pytest.mark.parametrize(("query", "prompt"), [("Hello there", None), ("Hello there", "Good day"), ("", None)])
def test_a_query_whose_response_is_not_seen_is_refused(query, prompt):
    with pytest.raises(UserError, match="send the prompts, too"):
        split_query(query, prompt)
