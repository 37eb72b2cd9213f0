"""Queries of OpenRLHF, which are a prompt and a response in one text."""

import re

from geli.nets.forms import Message, published_context
from geli.nets.templates import OwnTemplate, read_template
from geli.run.errors import UserError

_FIRST_TOKEN = re.compile(r"<[^<>\s]+>")  # as <s>, which tokenizers put before a text


def split_query(
    query: str, prompt: str | None = None, template: OwnTemplate | None = None
) -> tuple[str | list[Message], str]:
    """The prompt and the response (see `read_completion`) that a query of OpenRLHF consists of.

    Args:
        query: the prompt and the response as one text, with special tokens.
        prompt: the prompt alone; without it (or if the query does not begin with it, because it was cut), the query
            must be in the published form or written by a chat template that `read_prompt` knows.

    Raises:
        UserError: if it cannot be told where the response begins.
    """
    first = _FIRST_TOKEN.match(query)
    bare = query[first.end() :] if first else query
    for text in (query, bare):
        if prompt is not None and text.startswith(prompt):
            return prompt, text[len(prompt) :]
    before, marker, response = bare.rpartition(" AI:")
    if marker and published_context(before + marker) is not None:
        return before + marker, response
    messages = read_template(query, template)
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    raise UserError("it is not seen where the response begins: send the prompts, too, with which the queries begin")
