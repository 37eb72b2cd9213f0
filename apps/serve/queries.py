"""The queries of OpenRLHF, read as prompt and response."""

import re

from geli.nets.forms import Message, published_context, template_turns
from geli.run.errors import UserError

_FIRST_TOKEN = re.compile(r"<[^<>\s]+>")  # as <s>, which tokenizers put before a text
_END_TOKEN = re.compile(r"<\|im_end\|>|<\|eot_id\|>|<\|end_of_text\|>|<\|endoftext\|>|<end_of_turn>|<eos>|</s>")


def split_query(query: str, prompt: str | None = None) -> tuple[str | list[Message], str]:
    """The prompt and the response that a query of OpenRLHF consists of.

    Args:
        query: the prompt and the response as one text, with special tokens.
        prompt: the prompt alone; without it (or if the query does not begin with it, because it was cut), the query
            must be in the published form or written by a chat template that `read_prompt` knows.

    Raises:
        UserError: if it cannot be told where the response begins.
    """
    first = _FIRST_TOKEN.match(query)
    for text in (query, query[first.end() :]) if first else (query,):
        if prompt is not None and text.startswith(prompt):
            return prompt, _END_TOKEN.split(text[len(prompt) :], maxsplit=1)[0]
    turns = template_turns(query)
    if turns and turns[-1][0]:
        messages = [{"role": "assistant" if is_agent else "user", "content": text} for is_agent, text in turns]
        return messages[:-1], messages[-1]["content"]
    before, marker, response = query.rpartition(" AI:")
    if marker and published_context(before + marker) is not None:
        return before + marker, _END_TOKEN.split(response, maxsplit=1)[0]
    raise UserError("it is not seen where the response begins: send the prompts, too, with which the queries begin")
