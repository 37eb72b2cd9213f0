"""Options of the encoder and the policy, and the short names of published models. Imports neither torch nor
transformers, so that `--help` answers quickly."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from geli.run.errors import UserError
from geli.run.options import non_negative_int, option, positive_int, text_or_file

MAX_NEW_TOKENS = 128  # of a response
DONE_EVERY = 4  # tokens between two checks of whether a response can stop


class EncoderAlias(NamedTuple):
    """A short name for `--model`: the hub id, whether a LoRA adapter is trained instead of all weights, and a line of
    help."""

    hub_id: str
    adapted: bool
    help: str


ENCODERS = {
    "convo": EncoderAlias(
        "kabita-choudhary/finetuned-bart-for-conversation-summary", False, "BART, fine-tuned to summarize conversations"
    ),
    "longformer": EncoderAlias("allenai/longformer-base-4096", False, "Longformer, up to 4,096 tokens"),
    "longT5": EncoderAlias(
        "Stancld/longt5-tglobal-large-16384-pubmed-3k_steps", False, "LongT5 large, up to 16,384 tokens"
    ),
    "LLAMA2": EncoderAlias("meta-llama/Llama-2-7b-chat-hf", True, "Llama 2 7B, trained through a LoRA adapter"),
}

POLICIES = {  # short name for `--model_name` -> hub id
    "llama2": "meta-llama/Llama-2-7b-chat-hf",
    "llama": "huggyllama/llama-7b",
    "cosmo": "allenai/cosmo-xl",
    "blenderbot-1b": "facebook/blenderbot-1B-distill",
    "blenderbot-400m": "facebook/blenderbot-400M-distill",
    "dialogpt": "microsoft/DialoGPT-large",
    "smollm2": "",  # made by geli.nets.smollm2 on first use
}
SMOLLM2 = "smollm2"
LOCAL_LLAMA = "./llama_hf"  # used for `llama` if this folder exists, as in the published code


@dataclass(frozen=True)
class EncoderOptions:
    """Which text encoder is used, and how it is run."""

    model: str = option("convo", f"the text encoder: {', '.join(ENCODERS)}, or any hub id or folder")
    lang_model_path: str | None = option(
        None, "hub id or folder of an encoder instead of --model's own (default: --model's own)"
    )
    max_length: int = option(1024, "encoder tokens; less if the encoder's limit is lower", type=positive_int)
    tokens_per_batch: int | None = option(
        None, "padded tokens that the encoder takes at once (default: by device and memory)", type=positive_int
    )
    freeze_layers: int = option(
        0,
        "when the encoder is trained: train the layers above the lowest N alone, and compute the states below once "
        "where they fit into a quarter of the memory",
        type=non_negative_int,
        metavar="N",
    )
    compile: bool = option(False, "torch.compile the encoder (slow to start, then faster on a GPU)")

    def source(self) -> tuple[str, str]:
        """The hub id or folder of the encoder, and the option that names it, for error messages."""
        if self.lang_model_path:
            return self.lang_model_path, "--lang_model_path"
        alias = ENCODERS.get(self.model)
        return (alias.hub_id if alias else self.model), "--model"

    @property
    def adapted(self) -> bool:
        """Whether training changes a LoRA adapter instead of all weights."""
        return self.model in ENCODERS and ENCODERS[self.model].adapted


class Adapter(NamedTuple):
    """A LoRA adapter (Hu et al., 2022).

    Attributes:
        rank, alpha: of LoRA. layers: how many layers at the top it is in, in all their linear maps; 0: in the attention
            of all. targets: names of the modules that it changes instead.
    """

    rank: int
    alpha: float
    layers: int = 0
    targets: Sequence[str] | None = None


@dataclass(frozen=True)
class PolicyOptions:
    """Which language model is aligned in stage 3."""

    model_name: str = option("llama", f"the policy: {', '.join(POLICIES)}, or any hub id or folder")
    prompt_format: str | None = option(
        None,
        "how the policy reads a conversation: raw: as text, as published; chat: as messages, by the tokenizer's chat "
        "template (default: raw; with --val or --generate alone that of the checkpoint)",
        choices=("raw", "chat"),
    )
    instruction: str | None = option(
        None,
        "what the policy is told before each conversation: a text, or a file with it (default: as published, a casual "
        "conversation; with --val or --generate alone that of the checkpoint)",
        type=text_or_file,
        metavar="TEXT|FILE",
    )
    no_accel: bool = option(False, "one device, with LoRA r=24 alpha=48 by default instead of r=16 alpha=32")
    lora_r: int | None = option(None, "LoRA's rank (default: 16; --no_accel 24; --preset small 4)", type=positive_int)
    lora_alpha: int | None = option(None, "its scale (default: 32; --no_accel 48; --preset small 8)", type=positive_int)
    lora_target_modules: list[str] | None = option(
        None,
        "names of the modules that the adapter changes, as q_proj v_proj (default: those that peft knows for this "
        "kind of model, else its attention's; with --num_layers_unfrozen all linear maps)",
        nargs="+",
        metavar="NAME",
    )
    num_layers_unfrozen: int = option(
        0,
        "adapt so many layers at the top alone; those below are then computed once for reference and update, in "
        "float32 also for sampling; 0: all layers (default; with --preset small 1)",
        type=non_negative_int,
        metavar="N",
    )
    peft: bool = option(False, "accepted for the published commands; LoRA is always on")

    def source(self, cache_dir: Path | None = None) -> str:
        """The hub id or folder of the policy. `cache_dir`: where models that are made here lie.

        Raises:
            UserError: for such a model without a cache.
        """
        if self.model_name == "llama" and Path(LOCAL_LLAMA).is_dir():
            return LOCAL_LLAMA
        if self.model_name == SMOLLM2:
            if not cache_dir:
                raise UserError(
                    f"--model_name {SMOLLM2} is kept in the cache, which --no_cache turns off: write it to a folder "
                    "with tools/real_llama.py, and give that folder"
                )
            return str(cache_dir.resolve() / SMOLLM2)
        return POLICIES.get(self.model_name, self.model_name)

    @property
    def adapter(self) -> Adapter:
        """The adapter that is trained."""
        rank, alpha = (24, 48) if self.no_accel else (16, 32)
        targets = self.lora_target_modules and tuple(self.lora_target_modules)
        return Adapter(self.lora_r or rank, self.lora_alpha or alpha, self.num_layers_unfrozen, targets)
