"""Small corpora and small models that the tests share; made once a session, from nothing but this repository."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest

ROOT = Path(__file__).parent.parent


def environment_of_its_own(**more: str) -> dict[str, str]:
    """The environment of a process that is started as a user does it: its wandb is not this process' one."""
    return {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"} | more


def run_script(script: str, *arguments, cwd=None, check: int | None = 0, **environment):
    """Runs one of the commands as a user does; `check` is the exit code that is expected."""
    result = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment_of_its_own(**environment),
    )
    if check is not None:
        assert result.returncode == check, f"{script} exited with {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def call_script(script: str, *arguments, check: int = 0):
    """As `run_script`, in this process, which saves the seconds of starting one; returns what it printed."""
    import contextlib
    import importlib
    import io

    from accelerate.state import AcceleratorState

    import cli

    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate allows one setting a process
    out, error, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            cli.run(importlib.import_module(Path(script).stem).main)
        except SystemExit as exit_:
            code = exit_.code
    assert code == check, f"{script} exited with {code}\n{out.getvalue()}\n{error.getvalue()}"
    return subprocess.CompletedProcess(script, code, out.getvalue(), error.getvalue())


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """A sample corpus of 40 conversations: 36 for training, 4 for validation."""
    import sample_candor

    folder = tmp_path_factory.mktemp("sample") / "candor"
    sample_candor.write_corpus(folder, conversations=40, n_turns=14, seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny(sample) -> Path:
    """A small BART and a small Llama, trained for a few steps: enough to run, not to be any good."""
    from tiny_models import build

    folder = sample.parent / "models"
    build(sample, folder, ("bart", "llama"), seed=0, steps=12)
    return folder


T5_FORMS = ("$A </s>", "$A </s> $B </s>")
SMALL_WIDTH = 32


def small_model(kind: str, folder: Path, corpus: Path) -> Path:
    """An untrained model of an architecture that an alias stands for, with a tokenizer of its pair form."""
    import torch
    import transformers as hf

    from data_utils import read_corpus, turn_text
    from tiny_models import FORMS, train_tokenizer

    trajectories = next(iter(read_corpus(corpus, "overall_affect").trajectories.values()))
    texts = [turn_text(t.conversation, i, t.user, 4) for t in trajectories for i in t.agent_turns]
    forms = {"longt5": T5_FORMS, "t5": T5_FORMS, "llama": FORMS["llama"], "gpt2": ("$A", "$A $B")}
    forms |= {"t5-tied": T5_FORMS, "llama-encoder": FORMS["llama"]}
    tokenizer = train_tokenizer(texts, 400, forms.get(kind, FORMS["bart"]))
    tokenizer.model_max_length = 256
    ids = dict(vocab_size=len(tokenizer), pad_token_id=1, bos_token_id=0, eos_token_id=2)
    wide = dict(hidden_size=SMALL_WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    t5 = dict(d_model=SMALL_WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=1, **ids)
    bart = dict(
        d_model=SMALL_WIDTH, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=256,
        decoder_start_token_id=2, **ids,
    )  # fmt: skip
    gpt2 = dict(n_embd=SMALL_WIDTH, n_layer=2, n_head=2, n_positions=256, **{**ids, "pad_token_id": None})
    makers = {
        "bart": lambda: hf.BartModel(hf.BartConfig(**bart)),
        "longformer": lambda: hf.LongformerModel(
            hf.LongformerConfig(**wide, **ids, attention_window=16, max_position_embeddings=258)
        ),
        "longt5": lambda: hf.LongT5Model(
            hf.LongT5Config(**t5, local_radius=7, global_block_size=4, encoder_attention_type="transient-global")
        ),
        "llama-encoder": lambda: hf.LlamaModel(hf.LlamaConfig(**wide, **ids, max_position_embeddings=256)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**wide, **ids, max_position_embeddings=256)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2)),
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5)),
        "t5-tied": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5, tie_word_embeddings=True)),
        "blenderbot": lambda: hf.BlenderbotForConditionalGeneration(hf.BlenderbotConfig(**bart)),
    }
    torch.manual_seed(0)
    makers[kind]().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
