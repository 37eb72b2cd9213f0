"""The policy that people talk to: loading it, and its replies as they grow, token by token."""

import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

from geli.nets.options import SMOLLM2, PolicyOptions
from geli.nets.policy import Policy, adapter_of, load_policy, trained_as
from geli.nets.pretrained import named_by_file, recorded_base
from geli.nets.prompts import Prompt, with_instruction
from geli.nets.smollm2 import make_smollm2
from geli.rl.rollout import MARKERS, cut_responses
from geli.run.errors import UserError
from geli.run.files import read_json_or_empty

CONTEXT_TURNS = 10  # of history, as stage 3 has by default
MOST_TURNS = 10_000  # larger recorded values are not believed
MARKER_WORDS = MARKERS.pattern.split("|")

# ---------------------------------------------------------------------------------------------------------------------
# Replies


def so_far(text: str) -> str:
    """What can be shown of an unfinished reply: the text without a marker of the next turn, the beginning of one, an
    unfinished character, or spaces around it."""
    text = MARKERS.split(text, maxsplit=1)[0].rstrip("\ufffd")
    starts = (word[:n] for word in MARKER_WORDS for n in range(len(word) - 1, 0, -1))
    beginning = next((start for start in starts if text.endswith(start)), "")
    return text.removesuffix(beginning).strip()


class Partner:
    """A policy as people talk to it. One serves any number of conversations, and any number of threads.

    Args:
        policy: with its adapter. name: of the checkpoint or model.
        tuned: whether the adapter was trained; an untrained one is left off.
        context_turns: turns of history that it reads.
    """

    def __init__(self, policy: Policy, name: str, tuned: bool, context_turns: int = CONTEXT_TURNS):
        self.policy, self.name, self.tuned, self.context_turns = policy, name, tuned, context_turns
        self._lock = threading.Lock()
        self._reference = ExitStack()  # holds `policy.reference()` while the adapter is off
        self._adapter_on = True

    def stream(self, prompt: Prompt, uniforms: torch.Tensor, base: bool = False) -> Iterator[str]:
        """The reply to a prompt, sampled and cut as in training (`geli.rl.rollout.rollout`).

        The model is locked for one token at a time, so several replies can grow at once, and one that is given up
        blocks nobody.

        Args:
            uniforms: (1, r) in [0, 1), which select at most r tokens. base: from the policy without its adapter.

        Yields:
            The reply so far whenever more of it can be shown, each beginning with the one before it; the whole reply
            last.
        """
        policy, tokens, shown, decoder, token = self.policy, [], "", None, None

        def texts_of(rows) -> list[str]:
            return policy.tokenizer.batch_decode(rows, skip_special_tokens=True)

        for place in range(uniforms.shape[1]):
            with self._model(base):
                if decoder is None:
                    told = with_instruction(prompt, policy.format.instruction)
                    decoder = policy.decoder(*policy.tokenize([told]), room=uniforms.shape[1])
                else:
                    decoder.read(token)
                token = policy.sample(decoder.state, uniforms[:, place])
            tokens.append(int(token))
            text = texts_of([tokens])[0]
            if tokens[-1] in policy.ends or MARKERS.search(text):
                break
            grown = so_far(text)
            if len(grown) > len(shown) and grown.startswith(shown):  # some tokenizers change what they wrote before
                shown = grown
                yield shown
        yield cut_responses(torch.tensor([tokens]), texts_of, policy.ends)[1][0]

    @contextmanager
    def _model(self, base: bool) -> Iterator[None]:
        """Locks the model, with its adapter off for `base`. Switching it takes a quarter of a token's time on a small
        model, so it stays as it was left."""
        on = self.tuned and not base
        with self._lock, torch.no_grad():
            if on and not self._adapter_on:
                self._reference.close()
            elif self._adapter_on and not on:
                self._reference.enter_context(self.policy.reference())
            self._adapter_on = on
            yield


# ---------------------------------------------------------------------------------------------------------------------
# Loading


class Training(NamedTuple):
    """What stage 3 recorded of the training of a checkpoint; None for what it did not.

    Attributes:
        context_turns: turns of history in its prompts.
        reward_head: the recorded path of the head that it was trained with, or where that is now; it may be missing.
    """

    context_turns: int | None = None
    reward_head: Path | None = None


def training_of(weights: str | Path) -> Training:
    """The record of the run that wrote the checkpoint `{exp_name}_{model_name}_{step}/`, which is beside it."""
    folder = Path(weights)
    stem = re.fullmatch(r"(.+)_\d+", folder.resolve().name, re.ASCII)
    record = read_json_or_empty(folder.resolve().parent / f"{stem[1]}.json") if stem else {}
    arguments, head = record.get("arguments"), record.get("reward_head")
    turns = arguments.get("context_turns") if isinstance(arguments, dict) else None
    if isinstance(head, str) and not Path(head).is_file():  # the runs' folder was moved, or this is another one
        moved = folder.resolve().parent.parent / Path(head).parent.name / Path(head).name
        head = moved if moved.is_file() else head
    return Training(
        turns if type(turns) is int and 1 <= turns <= MOST_TURNS else None,
        Path(head) if isinstance(head, (str, Path)) else None,
    )


def is_checkpoint(weights: str) -> bool:
    """Whether `weights` is a folder with an adapter; otherwise it is a whole model."""
    return (Path(weights) / "adapter_config.json").is_file()


def load_partner(
    weights: str,
    accelerator: Accelerator,
    *,
    cache_dir: Path,
    base_model: str | None = None,
    prompt_format: str | None = None,
    context_turns: int | None = None,
    trust_remote_code: bool = False,
) -> Partner:
    """Loads a checkpoint of stage 3, or any language model.

    Args:
        weights: folder of the checkpoint, or a model as `--model_name` of stage 3.
        cache_dir: folder of the models that are made on this machine.
        base_model: the model under the checkpoint's adapter, if not the recorded one.
        prompt_format: a key of `PROMPT_FORMATS`; None: the checkpoint's, else `raw`.
        context_turns: turns of history; None: as in training.

    Raises:
        UserError: if it cannot be loaded.
    """
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    tuned, trained = is_checkpoint(weights), training_of(weights)
    if tuned:
        base, adapter = base_model or base_of_checkpoint(weights), adapter_of(weights, "--weights")
        recorded = trained_as(weights)
        prompt_format = prompt_format or recorded.prompt_format
    else:
        if base_model:
            raise UserError(f"--base_model is for a checkpoint with an adapter: {weights} has no adapter_config.json")
        options = PolicyOptions(model_name=weights)
        base, adapter = options.source(cache_dir), options.adapter
        if weights == SMOLLM2 and not Path(base).is_dir():
            make_smollm2(base)
    policy = load_policy(base, adapter, dtype, trust_remote_code, prompt_format or "raw", option="--weights")
    if tuned:
        policy.format.instruction = recorded.instruction
        policy.load(weights)
        policy.limit_responses(recorded.max_new_tokens)
    return Partner(
        policy.to(accelerator.device), Path(weights).resolve().name if tuned else Path(weights).name, tuned,
        context_turns or trained.context_turns or CONTEXT_TURNS,
    )  # fmt: skip


def base_of_checkpoint(weights: str) -> str:
    """The model that a checkpoint's adapter was trained on. One that was beside the checkpoint, as the model of an SFT
    warm start is, may have moved with it.

    Raises:
        UserError: if it is not on this machine.
    """
    base = recorded_base(weights, "--weights")
    beside = Path(weights).resolve().parent / Path(base).name
    if not Path(base).is_dir() and beside.is_dir():
        return str(beside)
    try:
        return named_by_file(base, Path(weights) / "adapter_config.json")
    except UserError as error:
        raise UserError(f"{error}; or name the model with --base_model") from None
