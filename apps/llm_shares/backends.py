"""Who is asked: a language model on a server, or one in a folder on this machine. `BACKENDS` is the table."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from apps.llm_shares.prompt import HIGHEST
from apps.openai_server import ChatClient, Server
from geli.nets.features import weights_digest
from geli.nets.pretrained import check_vocabulary, load_pretrained
from geli.run.distributed import frozen_dtype, make_accelerator
from geli.run.errors import UserError

API_KEY = "LLM_API_KEY"  # environment variable
REQUIREMENTS = "apps/llm_shares/requirements.txt"
CHARACTERS_PER_TOKEN = 4  # of English, where a server does not say how many tokens there were


@dataclass(frozen=True)
class BackendOptions:
    """Which model is asked, and how.

    Attributes:
        url: of an OpenAI-compatible server, up to `/v1`. model: its name there. folder: of a model on this machine.
        seed: of the server's sampling. max_tokens: of a server's reply. timeout: seconds that it may be silent.
        schema: the way, a key of `SCHEMAS`, in which the server is made to reply in JSON; None: free text.
        concurrency: requests at a time. device, dtype, trust_remote_code: as in the commands, for `folder`.
    """

    url: str | None = None
    model: str | None = None
    folder: str | None = None
    seed: int = 0
    max_tokens: int = 1024
    schema: str | None = None
    timeout: float = 120.0
    concurrency: int = 4
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False


class Reply(NamedTuple):
    """A model's reply: its text, the tokens that it read and wrote, and how long it took."""

    text: str
    tokens_in: int
    tokens_out: int
    seconds: float


class Backend(Protocol):
    """A model that can be asked.

    Attributes:
        identity: what a reply depends on besides the request. where: for messages. sends_text: whether text leaves the
            program. concurrency: requests at a time. form: of replies, a key of `FORMATS`.
        max_tokens: of a reply; None if each has exactly one number for each turn.
    """

    identity: list
    where: str
    sends_text: bool
    concurrency: int
    form: str
    max_tokens: int | None

    def check(self, text: str, n: int) -> None:
        """Raises a `UserError` if a request about n turns is known not to fit."""

    def ask(self, text: str, n: int) -> Reply:
        """The reply to a request about n turns.

        Raises:
            RequestFailed: if there is none.
        """


SCHEMAS = {  # name -> JSON schema of a reply -> `response_format` of the request
    "json_schema": lambda schema: {
        "type": "json_schema", "json_schema": {"name": "points", "schema": schema, "strict": True}
    },
    "json_object": lambda schema: {"type": "json_object", "schema": schema},
}  # fmt: skip


def points_schema(n: int) -> dict:
    """The JSON schema of an object with a whole number from 0 to `HIGHEST` for each of the keys 1 to n."""
    keys = [str(turn) for turn in range(1, n + 1)]
    properties = {key: {"type": "integer", "enum": list(range(HIGHEST + 1))} for key in keys}
    return {"type": "object", "properties": properties, "required": keys, "additionalProperties": False}


class ServerBackend:
    """A model on an OpenAI-compatible server (vLLM's, llama.cpp's, a vendor's). It replies in free text, or with
    `BackendOptions.schema` in JSON with exactly one number for each turn."""

    sends_text = True

    def __init__(self, options: BackendOptions):
        server = Server(options.url, options.model, options.seed, options.timeout, options.concurrency)
        self._client, self.max_tokens = ChatClient(server, API_KEY, REQUIREMENTS), options.max_tokens
        self._schema, self.form = options.schema, "json" if options.schema else "lines"
        self.identity = ["url", options.model, options.seed, options.max_tokens, options.schema]
        self.where, self.concurrency = server.host, options.concurrency

    def check(self, text: str, n: int) -> None:
        """How much fits is known to the server alone."""

    def ask(self, text: str, n: int) -> Reply:
        """The reply to one user message at temperature 0."""
        start = time.perf_counter()
        more = {"response_format": SCHEMAS[self._schema](points_schema(n))} if self._schema else {}
        reply, usage = self._client.ask(text, max_tokens=self.max_tokens, **more)
        seconds = time.perf_counter() - start
        tokens_in = (usage and usage.prompt_tokens) or len(text) // CHARACTERS_PER_TOKEN
        tokens_out = (usage and usage.completion_tokens) or len(reply) // CHARACTERS_PER_TOKEN
        return Reply(reply, tokens_in, tokens_out, seconds)


class FolderBackend:
    """A model in a folder, by transformers. Its decoding is constrained: it writes `1: `, then one of the numbers 0 to
    `HIGHEST`, then `2: `, and so on, so that every turn gets exactly one number.

    The number that is kept is the mean of all numbers by their probability (as in G-Eval, Liu et al., EMNLP 2023). It
    tells turns apart for which the same number is the most probable. The model goes on from the most probable one.
    Nothing is random.
    """

    sends_text, concurrency, form, max_tokens = False, 1, "lines", None

    def __init__(self, options: BackendOptions):
        name, trust = options.folder, options.trust_remote_code
        accelerator = make_accelerator(options.device, options.dtype)
        self.tokenizer = load_pretrained(AutoTokenizer, name, "--folder", trust)
        config = load_pretrained(AutoConfig, name, "--folder", trust)
        model = load_pretrained(
            AutoModelForCausalLM, name, "--folder", trust, config=config, dtype=frozen_dtype(accelerator)
        )
        check_vocabulary(self.tokenizer, model, name, "--folder")
        self.identity = ["folder", weights_digest(model.state_dict(), model.config.to_json_string())]
        self.model, self.where = model.to(accelerator.device).eval(), name

    def check(self, text: str, n: int) -> None:
        """Raises a `UserError` if a request about n turns and its answer are longer than the model's positions."""
        read = self._encode_request(text)
        positions = getattr(self.model.config, "max_position_embeddings", None) or 1 << 20
        if len(read) + 8 * n > positions:
            raise UserError(
                f"--folder {self.where}: a request has {len(read):,} tokens and its answer {8 * n:,}, the model has "
                f"room for {positions:,}: give a smaller --window"
            )

    @torch.inference_mode()
    def ask(self, text: str, n: int) -> Reply:
        """A line `turn: number` for each of n turns."""
        start = time.perf_counter()
        self.check(text, n)
        read = self._encode_request(text)
        tokens_in, cache, lines = len(read), None, []
        for turn in range(1, n + 1):
            forced, numbers = self._candidates(turn)
            logits, cache = self._read([*read, *forced], cache)
            probabilities = self._probabilities(logits, numbers, cache)
            lines.append(f"{turn}: {sum(number * p for number, p in enumerate(probabilities)):.4f}")
            read = numbers[max(range(HIGHEST + 1), key=probabilities.__getitem__)]
        tokens_out = cache.get_seq_length() + len(read) - tokens_in
        return Reply("\n".join(lines), tokens_in, tokens_out, time.perf_counter() - start)

    def _encode_request(self, text: str) -> list[int]:
        """Token ids of a request, in the model's chat form if it has one."""
        if not self.tokenizer.chat_template:
            return self.tokenizer(f"{text}\n\n", verbose=False)["input_ids"]
        message = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]

    def _candidates(self, turn: int) -> tuple[list[int], list[list[int]]]:
        """Token ids with which the lines `turn: 0` to `turn: 10` all begin, and those of the rest of each line."""
        lines = [f"{turn}: {number}\n" for number in range(HIGHEST + 1)]
        ids = self.tokenizer(lines, add_special_tokens=False)["input_ids"]
        common = next(i for i, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1)
        return ids[0][:common], [tokens[common:] for tokens in ids]

    def _read(self, ids: list[int], cache) -> tuple[torch.Tensor, object]:
        """Logits (V,) after reading more tokens, and the model's cache, which has them."""
        inputs = torch.tensor([ids], device=self.model.device)
        output = self.model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1].float(), output.past_key_values

    def _probabilities(self, logits: torch.Tensor, candidates: list[list[int]], cache) -> list[float]:
        """The probability of each candidate among them. One that shares its first tokens with another, as `1` and `10`
        do, is read as far as it does; the cache is left as it was.

        Args:
            logits: (V,) of the next token. candidates: token ids, none of which begins with all of another.
        """
        first = sorted({ids[0] for ids in candidates})
        of_first = dict(zip(first, logits[first].softmax(0).tolist(), strict=True))
        found = [0.0] * len(candidates)
        for token, probability in of_first.items():
            same = [i for i, ids in enumerate(candidates) if ids[0] == token]
            shares = [1.0]
            if len(same) > 1:
                logits, cache = self._read([token], cache)
                shares = self._probabilities(logits, [candidates[i][1:] for i in same], cache)
                cache.crop(-1)  # a negative number is how many tokens are removed
            for i, share in zip(same, shares, strict=True):
                found[i] = probability * share
        return found


class BackendRow(NamedTuple):
    """A kind of model that can be asked. `make`: `BackendOptions` -> `Backend`. `help`: one line."""

    make: Callable[[BackendOptions], Backend]
    help: str


BACKENDS = {  # by the option that names the model
    "url": BackendRow(ServerBackend, "a model on an OpenAI-compatible server"),
    "folder": BackendRow(FolderBackend, "a model in a folder on this machine"),
}
