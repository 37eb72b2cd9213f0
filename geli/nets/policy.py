"""The policy of stage 3: a language model with a LoRA adapter and a value head."""

import json
import math
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from geli.data.messages import INSTRUCTION
from geli.nets.decoding import CausalDecoder, EncoderDecoder, left_aligned
from geli.nets.options import DONE_EVERY, MAX_NEW_TOKENS, Adapter
from geli.nets.pretrained import check_adapter, check_adapter_weights, check_vocabulary, load_pretrained
from geli.nets.prompts import PROMPT_FORMATS, ChatFormat, Prompt, PromptFormat
from geli.nets.trunk import Trunk
from geli.run.console import is_main_process
from geli.run.errors import UserError, first_line
from geli.run.files import atomic_folder

LOGITS_PER_CHUNK = 1 << 25  # 128 MiB of float32
# names of weights in vision-text models, whose text model is used alone -> its own
TEXT_MODEL = {
    r"^(?:model\.)?language_model\.lm_head": "lm_head",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.",
}
VALUE_HEAD = "value_head.safetensors"  # in the folder of a saved policy


class TrainedAs(NamedTuple):
    """What a saved policy records: the form of its prompts, the most tokens of its responses, and its instruction."""

    prompt_format: str = "raw"
    max_new_tokens: int = MAX_NEW_TOKENS
    instruction: str = INSTRUCTION


class Policy(nn.Module):
    """A LoRA-adapted language model with a value head. The reference policy is the same network with the adapter off.

    The policy is always in eval mode: with dropout, the probabilities of rollout and update would differ.

    Args:
        model: PEFT model of a causal language model or an encoder-decoder. tokenizer: its tokenizer.
        prompt_format: how it reads prompts, a key of `PROMPT_FORMATS`. layers: how many layers at the top have an
            adapter; 0: all.

    Attributes:
        ends: ids of the tokens that end a response: those of the model's generation_config, of its tokenizer and of the
            chat template. max_new_tokens: most tokens of a response, see `limit_responses`.
        is_sharded: whether each process holds only a part of the weights (`geli.run.sharding.shard`). Every forward
            pass then needs all processes.
        largest: a function that returns the largest of the numbers that the processes call it with; of a model that is
            not sharded, the number itself.

    Raises:
        UserError: if the model computes its logits in a way that `_logits` does not know, or has no layers to choose
            from.
    """

    def __init__(self, model: PeftModel, tokenizer, prompt_format: str = "raw", layers: int = 0):
        super().__init__()
        self.model, self.tokenizer, self.prompt_format = model, tokenizer, prompt_format
        self.has_encoder = bool(model.config.is_encoder_decoder)
        self.format = PROMPT_FORMATS[prompt_format](tokenizer, continues=not self.has_encoder)
        self.ends = _end_tokens(model, self.format)
        self.max_new_tokens = MAX_NEW_TOKENS
        self.is_sharded, self.largest = False, int
        self.value_head = nn.Linear(model.config.hidden_size, 1)  # starts at 0
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.eval()
        self._trunk = split(self.model.get_base_model(), layers) if layers else None
        self._check_logits()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.value_head.weight.device

    @property
    def positions(self) -> int:
        """Tokens that the position table has room for."""
        return getattr(self.model.config, "max_position_embeddings", None) or 1 << 20

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of a prompt that there is room for; in a causal model, besides the longest response."""
        return self.positions if self.has_encoder else self.positions - self.max_answer_tokens

    @property
    def max_answer_tokens(self) -> int:
        """Tokens of a response, or of a human answer in SFT, that room is kept for behind a prompt."""
        return max(self.max_new_tokens, MAX_NEW_TOKENS)

    def limit_responses(self, max_new_tokens: int) -> None:
        """Sets the most tokens of a response, for which room is kept behind each prompt and which `save` records.

        Raises:
            UserError: if the position table has no room for them and a prompt.
        """
        self.max_new_tokens = max_new_tokens
        if not (1 <= max_new_tokens <= self.positions and self.max_prompt_tokens > 0):
            raise UserError(
                f"--max_new_tokens {max_new_tokens}: expected 1 or more, and room for a prompt besides; this model has "
                f"{self.positions:,} positions"
            )

    def trainable(self) -> list[nn.Parameter]:
        """The adapter's and the value head's parameters."""
        return [p for p in self.parameters() if p.requires_grad]

    def reference(self):
        """Context manager that turns the adapter off."""
        return self.model.disable_adapter()

    def tokenize(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask (n, Q) of n prompts, padded on the left for a causal model, whose response follows, and on
        the right for an encoder. A prompt that is too long is cut (see `RawFormat.encode`)."""
        encoded = [self.format.encode(prompt, self.max_prompt_tokens) for prompt in prompts]
        longest = max(map(len, encoded))
        ids = torch.full((len(encoded), longest), self.pad)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(encoded):
            place = slice(len(tokens)) if self.has_encoder else slice(longest - len(tokens), longest)
            ids[row, place] = torch.tensor(tokens)
            mask[row, place] = 1
        return ids.to(self.device), mask.to(self.device)

    @property
    def end(self) -> int:
        """Id of the token that is written behind a response, one of `ends`."""
        return self.format.end

    @property
    def pad(self) -> int:
        """Id of the padding token. Any id would do, because masks mark the padding."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end

    @torch.no_grad()
    def generate(
        self, query: torch.Tensor, query_mask: torch.Tensor, uniforms: torch.Tensor,
        done: Callable[[torch.Tensor], torch.Tensor] | None = None, copies: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Samples responses at temperature 1 from the full distribution, until all have ended.

        Args:
            query, query_mask: (n, Q) from `tokenize`.
            uniforms: (n, r) in [0, 1), which select each of at most r tokens by inverse transform sampling. A response
                so depends only on its row, not on the rest of the batch.
            done: responses so far (n, R) -> (n,) bool, which of them can stop; called every `DONE_EVERY` tokens.
            copies: how many times in a row each prompt stands in `query`.

        Returns:
            (n, R) token ids, padded after the end token or where `done` stopped a response; (n, R, hidden) the states
            that they were sampled from, for `logprobs_from_hidden`; and what `trunk` would return for them, where the
            decoder came by it.
        """
        response = torch.empty(len(query), 0, dtype=torch.long, device=query.device)
        ended, states = torch.zeros(len(query), dtype=torch.bool, device=query.device), []
        ends = torch.tensor(self.ends, device=query.device)
        with self._trunk.record() if self._trunk and not self.is_sharded else nullcontext() as passes:
            decoder = self.decoder(query, query_mask, uniforms.shape[1], copies)
            for step in range(1, uniforms.shape[1] + 1):
                token = self.sample(decoder.state, uniforms[:, step - 1]).masked_fill(ended, self.pad)
                response = torch.cat([response, token[:, None]], dim=1)
                states.append(decoder.state)
                ended |= torch.isin(token, ends)
                if done and step % DONE_EVERY == 0:
                    ended |= done(response).to(ended.device)
                unfinished = int(not ended.all()) if step < uniforms.shape[1] else 0
                if not self.largest(unfinished):
                    break
                decoder.read(token)
        return response, torch.stack(states, dim=1), decoder.join(passes) if passes else None

    def sample(self, states: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """(n,) next tokens, at temperature 1 from the full distribution.

        Args:
            states: (n, hidden) a decoder's `state`. uniforms: (n,) float64 in [0, 1), which select the tokens by
                inverse transform sampling.
        """
        # An accelerator may have no float64; the errors of float32 are small beside those of its logits.
        wide = torch.float64 if states.device.type == "cpu" else torch.float32
        cumulative = self._logits(states).to(wide).softmax(dim=-1).cumsum(dim=-1)
        total = cumulative[:, -1:].contiguous()
        goal = uniforms.to(cumulative)[:, None] * total  # which float32 may round to the total
        token = torch.searchsorted(cumulative, goal, right=True)
        return torch.minimum(token, torch.searchsorted(cumulative, total)).squeeze(1)

    def decoder(
        self, query: torch.Tensor, query_mask: torch.Tensor, room: int, copies: int = 1
    ) -> CausalDecoder | EncoderDecoder:
        """What reads the prompts (see `generate`), and then at most `room` tokens of their responses."""
        base = self.model.get_base_model()
        if self.has_encoder:
            return EncoderDecoder(base, query, query_mask)
        return CausalDecoder(base, query, query_mask, room, together=self.is_sharded, copies=copies)

    def forward(self, query, query_mask, response, response_mask):
        """The log-probability of each response token, and value and entropy of the state before it.

        Logits are computed only where `response_mask` is 1.

        Args:
            query, query_mask: (n, Q) from `tokenize`. response, response_mask: (n, R) right-padded.

        Returns:
            logprobs, values, entropies: (n, R) float32, 0 where the mask is 0.
        """
        hidden = self.states(query, query_mask, response, response_mask)
        return self.logprobs_from_hidden(hidden, response, response_mask)

    def logprobs_from_hidden(
        self, hidden: torch.Tensor, response: torch.Tensor, response_mask: torch.Tensor,
        other: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """As `forward`, from the states (n, R, hidden) before each response token.

        Args:
            other: (n, R, hidden) states of another policy, with which the distributions p of next tokens are compared.

        Returns:
            with `other` also the log-probabilities of the tokens under its distributions q, and KL(p || q) in nats,
            which has no sampling noise, unlike log p - log q of the token that was drawn.
        """
        kept = response_mask.bool()
        states, others = hidden[kept], () if other is None else (other[kept],)

        def of_chunk(states: torch.Tensor, tokens: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
            log_p, *log_qs = (self._logits(x).float().log_softmax(dim=-1) for x in (states, *others))
            of_tokens, *of_others = (x.gather(1, tokens[:, None]).squeeze(1) for x in (log_p, *log_qs))
            p = log_p.exp()
            kls = [(p * (log_p - log_q)).sum(dim=1) for log_q in log_qs]
            return of_tokens, -(p * log_p).sum(dim=1), *of_others, *kls

        logprobs, *compared = self._in_chunks(of_chunk, states, response[kept], *others)
        values = self.value_head(states.to(self.value_head.weight.dtype)).squeeze(1)
        zeros = torch.zeros(response.shape, device=response.device)
        return tuple(zeros.masked_scatter(kept, x.float()) for x in (logprobs, values, *compared))

    def _in_chunks(self, of_chunk: Callable, *columns: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What `of_chunk` returns for columns of m rows, the first of them states, in chunks, to bound the memory of
        their logits."""
        size = max(1, LOGITS_PER_CHUNK // self.model.config.vocab_size)
        starts = range(0, max(len(columns[0]), 1), size)  # of a chunk of no rows for m = 0
        parts = [of_chunk(*(column[start : start + size] for column in columns)) for start in starts]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def trunk(self, query, query_mask, response, response_mask) -> torch.Tensor | None:
        """(n, width, hidden) states below the adapted layers, which adapter and reference share, for `states`. None
        where all layers are adapted, or the model is sharded."""
        if self._trunk is None or self.is_sharded:
            return None
        return self._trunk(input_ids=self._ids(query, query_mask, response, response_mask))

    def states(self, query, query_mask, response, response_mask, trunk: torch.Tensor | None = None) -> torch.Tensor:
        """(n, R, hidden) the last hidden state before each response token. For n = 0 it runs a dummy row, because every
        process must take part in a sharded model's passes.

        Args:
            trunk: what `trunk` returned for these rows, or more columns of it, from where the pass continues; None: it
                begins with the tokens.
        """
        if not len(query):
            dummy = response.new_full((1, response.shape[1]), self.end)
            ones = torch.ones_like(dummy)
            return self.states(dummy[:, :1], ones[:, :1], dummy, ones)[:0]
        base = self.model.get_base_model()
        if self.has_encoder:
            encoded = base.get_encoder()(input_ids=query, attention_mask=query_mask).last_hidden_state
            start = torch.full_like(response[:, :1], base.config.decoder_start_token_id)
            return base.get_decoder()(
                input_ids=torch.cat([start, response[:, :-1]], dim=1), encoder_hidden_states=encoded,
                encoder_attention_mask=query_mask, use_cache=False,
            ).last_hidden_state  # fmt: skip
        ids = self._ids(query, query_mask, response, response_mask)
        if trunk is not None:
            states = trunk[:, : ids.shape[1]]
            hidden = self._trunk.top(states, inputs_embeds=states)
        else:
            hidden = getattr(base, base.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state
        places = query_mask.sum(dim=1)[:, None] - 1 + torch.arange(response.shape[1], device=ids.device)
        places = places.clamp(max=ids.shape[1] - 1)[..., None].expand(-1, -1, hidden.shape[2])
        return hidden.gather(1, places)

    @staticmethod
    def _ids(query, query_mask, response, response_mask) -> torch.Tensor:
        """(n, width) prompts with their responses. Rows begin in column 0, without the prompts' padding, and end after
        the longest one's last kept token."""
        lengths, kept = query_mask.sum(dim=1), response_mask.sum(dim=1).long()
        ids = left_aligned(torch.cat([query, response], dim=1), query.shape[1] - lengths)
        return ids[:, : int((lengths + kept).max())]

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        """(m, vocabulary) logits of states (m, hidden), equal to those of the model's own forward pass."""
        base = self.model.get_base_model()
        if getattr(base.config, "scale_decoder_outputs", False):  # T5 with tied embeddings
            states = states * base.config.d_model**-0.5
        logits = base.get_output_embeddings()(states)
        bias = getattr(base, "final_logits_bias", None)  # BART and its relatives
        return logits if bias is None else logits + bias

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Compares `_logits` with the model's own forward pass on one token, and generates two.

        Raises:
            UserError: if they differ, or what a decoder predicts depends on what follows.
        """
        query = torch.tensor([[self.end, self.end]], device=self.device)
        mask, response = torch.ones_like(query), query[:, :1]
        if self.has_encoder:
            start = torch.full_like(response, self.model.config.decoder_start_token_id)
            expected = self.model(input_ids=query, attention_mask=mask, decoder_input_ids=start).logits[:, -1]
        else:
            expected = self.model(input_ids=query, attention_mask=mask).logits[:, -1]
            changed = torch.tensor([[self.end, int(self.end == 0)]], device=self.device)
            first, other = (self.model(input_ids=ids).logits[:, 0] for ids in (query, changed))
            if not torch.allclose(first, other, atol=1e-4 if first.dtype == torch.float32 else 0.05, equal_nan=True):
                raise UserError(
                    f"--model_name: a model of the kind {self.model.config.model_type} predicts tokens from those that "
                    "follow, so it cannot write; choose a causal language model"
                )
        self.generate(query, mask, torch.zeros(1, 2, dtype=torch.float64))
        found = self._logits(self.states(query, mask, response, torch.ones_like(response))[:, 0])
        if not torch.allclose(found.float(), expected.float(), atol=0.05, rtol=0.02):
            raise UserError(
                f"--model_name: a model of the kind {self.model.config.model_type} changes its logits after its last "
                "layer in a way that this program does not know; choose another policy"
            )

    def save(self, folder: str | Path, card: str = "") -> None:
        """Writes a PEFT adapter with its tokenizer and `value_head.safetensors`, which records the prompt format and
        the most tokens of a response, atomically. Only the main process writes. Args: card: the README."""
        if not is_main_process():
            return
        recorded = TrainedAs(self.prompt_format, self.max_new_tokens, self.format.instruction)._asdict()
        with atomic_folder(folder) as temporary:
            self.model.save_pretrained(temporary, save_embedding_layers=False)
            self.tokenizer.save_pretrained(temporary)
            if card:
                (temporary / "README.md").write_text(card, encoding="utf-8")
            weights = {k: v.detach().cpu().contiguous() for k, v in self.value_head.state_dict().items()}
            metadata = {"policy": json.dumps(recorded)}  # one entry: the order of several is not fixed
            save_file(weights, temporary / VALUE_HEAD, metadata=metadata)

    def save_merged(self, folder: str | Path) -> None:
        """Writes the whole model with the adapter merged into its weights, and its tokenizer, atomically. This releases
        the memory of the policy, which cannot be used any more."""
        merged = self.model.merge_and_unload()
        if is_main_process():  # gigabytes, so not once for each process
            with atomic_folder(folder) as temporary:
                merged.save_pretrained(temporary)
                self.tokenizer.save_pretrained(temporary)
        self.to("meta")

    def load(self, folder: str | Path) -> None:
        """Loads the adapter and the value head that `save` wrote.

        Raises:
            UserError: if they do not fit this policy.
        """
        saved, own = check_adapter(folder, "the policy's checkpoint"), self.model.peft_config["default"]
        names = sorted(saved.get("target_modules") or ())
        if names != sorted(own.target_modules):
            raise UserError(f"{folder}: an adapter of other modules: give --lora_target_modules {' '.join(names)}")
        base = saved.get("base_model_name_or_path")
        if base != own.base_model_name_or_path:
            print(f"Warning: {folder} was trained on {base!r}, --model_name is {own.base_model_name_or_path}")
        try:
            set_peft_model_state_dict(self.model, check_adapter_weights(self.model, folder))
            value_head = load_file(Path(folder) / VALUE_HEAD)
            if not all(torch.isfinite(tensor).all() for tensor in value_head.values()):
                raise ValueError("a value head that is not finite")
            self.value_head.load_state_dict(value_head)
        except Exception as error:  # other people's files can fail in any way
            raise UserError(f"{folder}: not an adapter that fits this policy ({first_line(error)})") from None


def _end_tokens(model: PeftModel, form: PromptFormat) -> tuple[int, ...]:
    """The ids of `Policy.ends`, ascending, which the model's generation_config then has, too: TRL's trainers and merged
    models read them there."""
    settings = model.get_base_model().generation_config
    if form.end is None:
        raise UserError(
            f"--model_name {form.tokenizer.name_or_path}: expected an end token, found none: name it as eos_token in "
            "tokenizer_config.json"
        )
    listed = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    with suppress(UserError):  # without a usable chat template
        listed = [*listed, ChatFormat(form.tokenizer).end]
    ends = {form.end, form.tokenizer.eos_token_id, *listed} - {None}
    settings.eos_token_id = sorted(ends) if len(ends) > 1 else form.end
    return tuple(sorted(ends))


def trained_as(folder: str | Path) -> TrainedAs:
    """What a saved policy records of its training.

    Raises:
        UserError: if it cannot be read, or records what this program does not know.
    """
    path = Path(folder) / VALUE_HEAD
    try:
        with safe_open(path, "pt") as file:
            recorded = (file.metadata() or {}).get("policy", "{}")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: expected a value head (a safetensors file): {first_line(error)}") from None
    with suppress(ValueError, TypeError, RecursionError):
        found = TrainedAs(**json.loads(recorded))
        if found.prompt_format in PROMPT_FORMATS and list(map(type, found)) == [str, int, str]:
            return found
    known = ", ".join(PROMPT_FORMATS)
    raise UserError(f"{path}: expected a prompt format of {known} and a number of tokens, found {recorded!r}"[:300])


def adapter_of(folder: str | Path, option: str) -> Adapter:
    """The adapter of a saved policy.

    Raises:
        UserError: if it scales its weights in another way than stage 3's adapters, or adapts other layers.
    """
    saved = check_adapter(folder, option)
    alpha, layers, targets = (saved.get(key) for key in ("lora_alpha", "layers_to_transform", "target_modules"))
    if saved.get("use_rslora") or type(alpha) not in (int, float) or not (math.isfinite(alpha) and alpha > 0):
        raise UserError(
            f"{option} {folder}: adapter_config.json: expected an adapter of stage 3, with a positive lora_alpha and "
            f"without use_rslora, found {str(alpha)[:40]} and {str(saved.get('use_rslora'))[:40]}"
        )
    if layers is not None and not (isinstance(layers, list) and layers and all(type(i) is int for i in layers)):
        raise UserError(f"{option} {folder}: adapter_config.json: layers_to_transform: expected a list of numbers")
    return Adapter(saved["r"], alpha, len(layers or ()), targets)


def load_policy(
    name: str, adapter: Adapter, dtype: torch.dtype, trust_remote_code: bool = False, prompt_format: str = "raw",
    option: str = "--model_name",
) -> Policy:  # fmt: skip
    """Loads a language model (hub id or folder) as a policy with a new adapter, which does not change its output yet.

    Args:
        dtype: of the frozen weights; the adapter is float32.
        trust_remote_code: run code that the model brings along. prompt_format: a key of `PROMPT_FORMATS`.
        option: the option that names it, for error messages.

    Raises:
        UserError: if the model cannot be loaded, its tokenizer lacks what the prompt format needs, or no policy can be
            made of it.
    """
    tokenizer = load_pretrained(AutoTokenizer, name, option, trust_remote_code)
    config = load_pretrained(AutoConfig, name, option, trust_remote_code)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    text = config if config.is_encoder_decoder else config.get_text_config()
    names = {} if text is config else {"key_mapping": TEXT_MODEL}
    model = load_pretrained(kind, name, option, trust_remote_code, config=text, dtype=dtype, **names)
    if names:
        model._weight_conversions = []  # it is saved by its own names
    check_vocabulary(tokenizer, model, name, option)
    try:
        return adapt_policy(model, tokenizer, adapter, prompt_format)
    except UserError:
        raise
    except Exception as error:  # architectures differ in any way
        hint = ": name other modules with --lora_target_modules" if "module" in str(error).lower() else ""
        raise UserError(
            f"{option} {name}: no policy can be made of a model of the kind {config.model_type}: "
            f"{first_line(error)[:300]}{hint}"
        ) from None


def linears_of_layers(model) -> set[str]:
    """Names of the linear maps in each layer of a model that is made as Llama; of another there are none."""
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {found[1] for name in linears if (found := re.search(r"\.layers\.\d+\..*?(\w+)$", name))}


def split(model, layers: int) -> Trunk:
    """The layers below the `layers` at the top of a language model.

    Raises:
        UserError: if it has an encoder, or another shape than Llama's.
    """
    try:
        if model.config.is_encoder_decoder or not linears_of_layers(model):
            raise ValueError("expected a model without an encoder, whose layers are made as Llama's")
        return Trunk(getattr(model, model.base_model_prefix), layers, use_cache=False)
    except ValueError as error:
        raise UserError(
            f"--num_layers_unfrozen {layers} (the default of --preset small is 1): {error}; found one of the kind "
            f"{model.config.model_type}: give 0, which adapts all layers"
        ) from None


def adapt_policy(model, tokenizer, adapter: Adapter, prompt_format: str = "raw") -> Policy:
    """A policy of a loaded language model with a new adapter.

    Raises:
        UserError: if the adapter is for the top layers, and the model cannot be split there (see `split`).
    """
    config, targets = model.config, adapter.targets and list(adapter.targets)
    if adapter.layers:
        split(model, adapter.layers)  # refuses other shapes in words, which peft would not
        last, settings = config.num_hidden_layers, {"target_modules": targets or linears_of_layers(model)}
        settings["layers_to_transform"] = list(range(max(last - adapter.layers, 0), last))
    else:
        has_q = any(n.endswith("q_proj") for n, _ in model.named_modules())
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(config.model_type)
        found = targets or known or ({"q_proj", "v_proj"} if has_q else "all-linear")
        settings = {"target_modules": "all-linear" if "all-linear" in found else found}
    lora = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=0.05,
        task_type="SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM",
        fan_in_fan_out=config.model_type == "gpt2", **settings,  # gpt2 stores weights transposed
    )  # fmt: skip
    return Policy(get_peft_model(model, lora), tokenizer, prompt_format, adapter.layers)
