"""A query of OpenRLHF is split into the prompt and the response that it was made from, or refused."""

import pytest

from apps.serve.queries import split_query
from geli.nets.forms import read_completion, read_prompt
from geli.nets.prompts import prompt_text
from geli.run.errors import UserError

CONTEXT = " User: I lost my job.  AI: Oh no.  User: Yes.\nToday."
CHATML = (
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nI lost my job.<|im_end|>\n"
    "<|im_start|>assistant\nOh no.<|im_end|>\n<|im_start|>user\nYes.\nToday.<|im_end|>\n<|im_start|>assistant\n"
)
LLAMA_3 = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nI lost my job.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nOh no.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nYes.\nToday.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
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
    assert read_prompt(before, 10).context == CONTEXT and read_completion(response).strip() == "Why?"


@pytest.mark.parametrize(("query", "prompt"), [("Hello there", None), ("Hello there", "Good day"), ("", None)])
def test_a_query_whose_response_is_not_seen_is_refused(query, prompt):
    with pytest.raises(UserError, match="send the prompts, too"):
        split_query(query, prompt)
