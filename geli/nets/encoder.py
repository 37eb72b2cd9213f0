"""The text encoder: (context, response) pairs to one vector a turn."""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoTokenizer

from geli.nets.batching import CPU_TOKENS, token_batches
from geli.nets.options import EncoderOptions
from geli.nets.pretrained import check_vocabulary, load_adapter, load_pretrained, named_by_file, recorded_base
from geli.nets.trunk import Trunk
from geli.run.console import is_main_process, progress_bar
from geli.run.distributed import available_memory, frozen_dtype
from geli.run.errors import UserError
from geli.run.files import atomic_folder
from geli.run.sharding import full_state, shard


class TokenPair(NamedTuple):
    """A tokenized (context, response): (n,) int32 ids with all special tokens, and how many belong to the first
    segment."""

    ids: np.ndarray
    first_segment: int

    @property
    def key(self) -> bytes:
        """Bytes that identify it."""
        return self.ids.tobytes() + self.first_segment.to_bytes(4, "little")


class TurnEncoder(nn.Module):
    """Encodes (context, response) pairs. A turn's representation is the last hidden state at its last end token.

    Args:
        model: a Hugging Face model; of an encoder-decoder only the encoder is run.
        tokenizer: its fast tokenizer, whose format of pairs is used.
        max_length: tokens of a pair, lowered to the encoder's own limit. A longer pair loses the beginning of its
            context; a response that is too long by itself loses its own beginning.
        name: hub id or folder that it was loaded from.

    Attributes:
        tokens_per_batch: padded tokens that are encoded at once; None: as many as memory allows.
        is_sharded, largest: see `geli.run.sharding.shard`.

    Raises a `UserError` if `max_length` leaves no room for text, or the tokenizer has no end token.
    """

    def __init__(self, model, tokenizer, max_length: int = 1024, name: str = ""):
        super().__init__()
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.max_length = min(max_length, own_limit(model.config, tokenizer))
        self._prefix, self._between, self._suffix, self._between_first = _pair_format(tokenizer)
        self._uses_segments = "token_type_ids" in tokenizer.model_input_names
        self._room = self.max_length - len(self._prefix) - len(self._between) - len(self._suffix)
        if self._room < 1:
            raise UserError(
                f"--max_length {max_length}: at least {self.max_length - self._room + 1} tokens are needed, for the "
                "special tokens and one of text"
            )
        if not self._suffix:
            raise UserError(f"{name}: its tokenizer has neither an end nor a separator token, where a turn is read")
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self._suffix[-1]
        self.tokens_per_batch: int | None = None
        self.is_sharded, self.largest = False, int
        self._compiled: Callable | None = None
        self._trunk: Trunk | None = None
        self._below: dict[bytes, torch.Tensor] = {}  # pair -> (tokens, hidden) states of the trunk

    def freeze_layers(self, n: int) -> None:
        """Trains only the layers above the lowest `n` from now on; what is below computes without dropout.

        Raises:
            UserError: if no layer is left to train, or the model has another shape (see `Trunk`).
        """
        try:
            if hasattr(self.model, "peft_config"):
                raise ValueError("its adapter is in all layers")
            layers = getattr(self.encoder.config, "num_hidden_layers", 0)
            if n >= layers:
                raise ValueError(f"it has {layers} layers, and one must be left to train")
            self._trunk = Trunk(self.encoder, layers - n)
        except ValueError as error:
            raise UserError(f"--freeze_layers {n}: {self.name} has no frozen layers: {error}") from None
        self.model.requires_grad_(False)
        self._trunk.layers.requires_grad_(True)

    @property
    def has_frozen_layers(self) -> bool:
        """Whether `freeze_layers` was called."""
        return self._trunk is not None

    def train(self, mode: bool = True) -> "TurnEncoder":
        """As of any module; frozen layers stay in eval mode."""
        super().train(mode and self._trunk is None)
        if self._trunk:
            self._trunk.layers.train(mode)
        self.training = mode
        return self

    def remember(self, pairs: Sequence[TokenPair], autocast=nullcontext) -> None:
        """Computes the frozen layers' states of n pairs once, for all later passes. Without frozen layers, or if the
        states do not fit into a quarter of the memory, does nothing."""
        if self._trunk is None:
            return
        missing = list({pair.key: pair for pair in pairs if pair.key not in self._below}.values())
        lengths = np.array([len(pair.ids) for pair in missing], dtype=int)
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine; each keeps all states
        size = 4 * self.hidden_size * lengths.sum() * processes
        if size > 0.25 * available_memory():
            print(f"The frozen layers' states take {size / 2**30:.1f} GiB: they are computed anew in every pass")
            return
        with progress_bar(total=len(missing), desc="frozen layers", unit="turn") as bar:
            for batch in token_batches(lengths, self.token_budget()):
                with autocast():
                    states = self._trunk(**self.collate([missing[i] for i in batch])).float().cpu()
                for i, row in zip(batch, states, strict=True):
                    self._below[missing[i].key] = row[: lengths[i]].clone()
                bar.update(len(batch))

    def compile(self) -> None:
        """Runs the encoder through `torch.compile` from now on. What is saved stays the same."""
        self._compiled = torch.compile(self.encoder, dynamic=True)

    def token_budget(self, gradients: bool = False) -> int:
        """Padded tokens to encode at once: `tokens_per_batch`, or what a CPU reads fastest, or what fits into a part of
        the memory that the machine, or the container, has. It does not depend on what else is in memory, so that
        results do not either, and has an upper limit above which larger batches are no faster."""
        if self.tokens_per_batch:
            return self.tokens_per_batch
        if self.device.type == "cpu" and not gradients:
            return CPU_TOKENS
        layer = 4 * 24 * self.hidden_size  # bytes a token: one layer's activations, with a feed-forward 4 times as wide
        layers = getattr(self.model.config, "num_hidden_layers", 12) if gradients else 1
        if self.device.type == "cuda":
            memory, limit = 0.4 * torch.cuda.get_device_properties(self.device).total_memory, 1 << 18
        else:
            memory, limit = 0.25 * available_memory(), 1 << 15
        return max(min(int(memory / layer / layers), limit), self.max_length)

    @property
    def encoder(self) -> nn.Module:
        """The part of the model that is run."""
        return self.model.get_encoder() if self.model.config.is_encoder_decoder else self.model

    @property
    def hidden_size(self) -> int:
        """Width of the representation."""
        return self.model.config.hidden_size

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that training changes: the encoder's (without a decoder's), or its adapter's."""
        return [p for p in self.encoder.parameters() if p.requires_grad]

    def tokenize(self, pairs: Sequence[tuple[str, str]]) -> list[TokenPair]:
        """Token ids of (context, response) pairs, cut to `max_length`. Every pair ends with an end token."""
        if not pairs:
            return []
        contexts, responses = (
            self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
            for texts in zip(*pairs, strict=True)
        )
        result = []
        for context, response in zip(contexts, responses, strict=True):
            response = response[-self._room :]
            spare = self._room - len(response)
            context = context[-spare:] if spare else []
            ids = [*self._prefix, *context, *self._between, *response, *self._suffix]
            first_segment = len(self._prefix) + len(context) + self._between_first
            result.append(TokenPair(np.array(ids, dtype=np.int32), first_segment))
        return result

    def collate(self, pairs: Sequence[TokenPair]) -> dict[str, torch.Tensor]:
        """Right-padded model inputs (n, longest) on the encoder's device."""
        lengths, starts = np.array([(len(pair.ids), pair.first_segment) for pair in pairs]).T
        columns = np.arange(lengths.max())
        mask = columns < lengths[:, None]
        ids = np.full(mask.shape, self._pad)
        ids[mask] = np.concatenate([pair.ids for pair in pairs])
        arrays = {"input_ids": ids, "attention_mask": mask}
        if self._uses_segments:
            arrays["token_type_ids"] = mask & (columns >= starts[:, None])
        return {name: torch.from_numpy(array.astype(np.int64)).to(self.device) for name, array in arrays.items()}

    def forward(self, input_ids, attention_mask, below=None, **segments) -> torch.Tensor:
        """(n, hidden) representations of right-padded rows (n, longest), each ending with an end token; from the states
        (n, longest, hidden) `below` the layers that train, if they are known."""
        run = self.encoder if self._compiled is None else self._compiled  # a compiled module has no truth value
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **segments}
        hidden = run(**inputs).last_hidden_state if below is None else self._trunk.top(below, **inputs)
        last = attention_mask.sum(dim=1) - 1
        return hidden[torch.arange(len(last), device=hidden.device), last]

    def _features(self, pairs: Sequence[TokenPair], autocast) -> torch.Tensor:
        """(n, hidden) float32 of one forward pass; encodes a dummy pair if there are none, because with a sharded model
        every process must take part."""
        dummy = TokenPair(np.array(self._suffix[-1:], dtype=np.int32), 1)
        below = [self._below.get(pair.key) for pair in pairs] if self._below else [None]
        known = {}
        if pairs and not any(states is None for states in below):
            known["below"] = nn.utils.rnn.pad_sequence(below, batch_first=True).to(self.device)
        with autocast():
            return self(**self.collate(pairs or [dummy]), **known).float()[: len(pairs)]

    def encode_with_gradients(self, pairs: Sequence[TokenPair], autocast=nullcontext, calls: int = 1) -> torch.Tensor:
        """(n, hidden) float32 representations that gradients flow through.

        If the pairs do not fit into memory at once, they are encoded in batches of similar lengths with activation
        checkpointing: the backward pass computes each batch again, with the same dropout, so memory does not grow with
        n.

        Args:
            pairs: n tokenized pairs. autocast: a context-manager factory.
            calls: number of such calls whose activations are kept at the same time.
        """

        def features(batch):
            return self._features([pairs[i] for i in batch], autocast)

        if not len(pairs) and not self.is_sharded:
            return torch.zeros(0, self.hidden_size)
        lengths = np.array([len(pair.ids) for pair in pairs], dtype=int)
        budget = self.token_budget(gradients=True)
        batches = token_batches(lengths, budget)
        passes = 0 if lengths.max(initial=0) * len(lengths) * calls <= budget else len(batches)
        passes = self.largest(passes)
        if passes:
            batches += [np.arange(0)] * (passes - len(batches))
            rows = [checkpoint(features, batch, use_reentrant=False) for batch in batches]
        else:
            # Everything fits at once, in every process. A CPU is faster in smaller passes, but not in tiny ones: each
            # computes a gradient of all embeddings.
            split = self.device.type == "cpu" and not self.is_sharded
            batches = token_batches(lengths, 2 * CPU_TOKENS) if split else [np.arange(len(pairs))]
            rows = [features(batch) for batch in batches]
        order = torch.from_numpy(np.argsort(np.concatenate(batches)))
        return torch.cat(rows)[order.to(rows[0].device)]

    @torch.no_grad()  # not inference_mode: heads are trained on the result
    def encode(
        self, pairs: Sequence[TokenPair], autocast=nullcontext, progress: str | None = None,
        on_batch: Callable[[np.ndarray, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """(n, hidden) float32 representations on the CPU, computed in eval mode in batches of similar lengths.

        Args:
            pairs: n tokenized pairs. autocast: a context-manager factory. progress: description of a progress bar.
            on_batch: called with the indices of each batch and its features, as soon as they are computed.
        """
        was_training = self.training
        self.eval()
        features = torch.empty(len(pairs), self.hidden_size)
        lengths = np.array([len(pair.ids) for pair in pairs])
        batches = token_batches(lengths, self.token_budget())
        batches += [np.arange(0)] * (self.largest(len(batches)) - len(batches))  # as many passes in every process
        with progress_bar(total=len(pairs), desc=progress, unit="turn", disable=progress is None) as bar:
            for batch in batches:
                features[batch] = self._features([pairs[i] for i in batch], autocast).cpu()
                if on_batch:
                    on_batch(batch, features[batch])
                bar.update(len(batch))
        self.train(was_training)
        return features

    def save(self, folder: str | Path) -> None:
        """Writes model (or adapter) and tokenizer in Hugging Face's format, atomically. All processes must call it; the
        main one writes."""
        adapted = hasattr(self.model, "peft_config")  # then only the adapter is written, which is never sharded
        state = full_state(self.model) if self.is_sharded and not adapted else None
        if is_main_process():
            with atomic_folder(folder) as temporary:
                self.model.save_pretrained(temporary, state_dict=state)
                self.tokenizer.save_pretrained(temporary)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_encoder(
    name: str, max_length: int = 1024, option: str = "--lang_model_path", adapt: bool = False,
    dtype: torch.dtype = torch.float32, trust_remote_code: bool = False,
) -> TurnEncoder:  # fmt: skip
    """Loads an encoder from a folder (then offline) or from the hub. A folder with an adapter (`adapter_config.json`)
    brings the base model that it records.

    Dropout on attention weights is turned off: with it, BERT-like encoders use no fused attention kernel on a CPU, and
    train half as fast. Dropout on hidden states stays.

    Args:
        adapt: add a new LoRA adapter (r=8, alpha=16, dropout 0.1), which is then what is trained and saved.
        dtype: of the weights under an adapter; all other weights are float32.
        option: the option that names it, for error messages.
        trust_remote_code: run code that the model brings along.
    """
    adapter, base = None, name
    if (Path(name) / "adapter_config.json").is_file():
        adapter = name
        base = named_by_file(recorded_base(name, option), Path(name) / "adapter_config.json")
    tokenizer = load_pretrained(AutoTokenizer, name, option, trust_remote_code)
    config = load_pretrained(AutoConfig, base, option, trust_remote_code)
    for dropout in ("attention_dropout", "attention_probs_dropout_prob"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    if not config.is_encoder_decoder and hasattr(config, "use_cache"):
        config.use_cache = False
    weights = dtype if adapter or adapt else torch.float32
    model = load_pretrained(AutoModel, base, option, trust_remote_code, config=config, dtype=weights)
    check_vocabulary(tokenizer, model, name, option)
    if adapter:
        model = load_adapter(model, adapter, option)
    elif adapt:
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, task_type="FEATURE_EXTRACTION"))
        if Path(base).is_dir():  # an absolute path, so that the saved adapter can be loaded from any folder
            model.peft_config["default"].base_model_name_or_path = str(Path(base).resolve())
    return TurnEncoder(model, tokenizer, max_length, name)


def place_encoder(
    encoder: TurnEncoder, accelerator: Accelerator, options: EncoderOptions, trains: bool = False
) -> TurnEncoder:
    """Moves an encoder to its device, to run as the options say. One that trains is sharded if `accelerate launch` was
    configured for that; with `--compile` or `--freeze_layers` that is a `UserError`."""
    encoder.tokens_per_batch = options.tokens_per_batch
    if trains:
        shard(encoder, accelerator)
    else:
        encoder.to(accelerator.device)
    for option in ("compile", "freeze_layers"):
        if getattr(options, option) and encoder.is_sharded:
            raise UserError(f"--{option} does not work on a sharded encoder: leave it out, or train whole copies")
    if options.freeze_layers and options.compile:
        raise UserError("--compile is for whole encoders: leave it out, or --freeze_layers")
    if options.freeze_layers and trains:
        encoder.freeze_layers(options.freeze_layers)
    if options.compile:
        encoder.compile()
    return encoder


def open_encoder(
    options: EncoderOptions, accelerator: Accelerator, trust_remote_code: bool, name: str | None = None,
    trains: bool = False,
) -> TurnEncoder:  # fmt: skip
    """The encoder `name` (None: the one that the options name), placed (`place_encoder`). One that trains gets the
    adapter that `--model` asks for."""
    source, option = options.source()
    adapt, dtype = trains and options.adapted, frozen_dtype(accelerator)
    encoder = load_encoder(name or source, options.max_length, option, adapt, dtype, trust_remote_code)
    return place_encoder(encoder, accelerator, options, trains)


def own_limit(config, tokenizer) -> int:
    """Tokens that a model accepts: the size of its position table (less RoBERTa's padding offset), if it has one."""
    limits = [1 << 20]
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        offset = config.pad_token_id + 1 if config.model_type in ("roberta", "longformer", "xlm-roberta") else 0
        limits.append(positions - offset)
    if tokenizer.model_max_length and tokenizer.model_max_length < 1 << 20:
        limits.append(tokenizer.model_max_length)
    return min(limits)


def _pair_format(tokenizer) -> tuple[list[int], list[int], list[int], int]:
    """The special tokens that a tokenizer puts before, between and after a pair, and how many of those between belong
    to the first segment. If it puts none after a pair, its end token is added."""
    encoded = tokenizer("a", "b", return_token_type_ids=True)
    ids, parts = encoded["input_ids"], encoded.sequence_ids(0)
    segments = encoded.get("token_type_ids") or [0] * len(ids)
    first = [i for i, part in enumerate(parts) if part == 0]
    second = [i for i, part in enumerate(parts) if part == 1]
    between = range(first[-1] + 1, second[0])
    suffix = ids[second[-1] + 1 :]
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if not suffix and end is not None:
        suffix = [end]
    return ids[: first[0]], [ids[i] for i in between], suffix, sum(segments[i] == 0 for i in between)
