"""Untrained models of the architectures that the aliases stand for, and untrained reward heads on them."""

import shutil
from pathlib import Path

import torch
import transformers as hf

from data_utils import read_corpus, turn_text
from geli.heads import encoder_reference, save_reward_head
from geli.nets.encoder import load_encoder
from models import RewardHead, RewardHeadConfig
from tools.tiny_models import FORMS, train_tokenizer

T5_FORMS = ("$A </s>", "$A </s> $B </s>")
SMALL_WIDTH = 32


def small_model(kind: str, folder: Path, corpus: Path) -> Path:
    """An untrained model of an architecture that an alias stands for, with a tokenizer of its pair form."""
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
        "bert": lambda: hf.BertModel(hf.BertConfig(**wide, **ids, max_position_embeddings=256)),
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


def chat_model(source: Path, folder: Path) -> Path:
    """A copy of a model whose tokenizer has a chat template; returns the folder."""
    shutil.copytree(source, folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def write_head(folder: Path, encoder: Path, head: str = "default", **config) -> Path:
    """An untrained reward head on a small encoder; returns its file."""
    torch.manual_seed(0)
    hidden = load_encoder(str(encoder)).hidden_size
    settings = dict(max_length=256, context_turns=4, stage=2, reward_class="how_enjoyable", redist_type="RRD") | config
    folder.mkdir(parents=True, exist_ok=True)
    config = RewardHeadConfig(head=head, hidden=hidden, **encoder_reference(encoder, folder), **settings)
    save_reward_head(RewardHead(config), folder / f"reward1_{head}")
    return folder / f"reward1_{head}"
