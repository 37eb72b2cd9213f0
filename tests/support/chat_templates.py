"""Chat templates in wide use, restated from their models in as few words as they allow; talks to write by them."""

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace

from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from geli.nets.forms import read_prompt
from geli.run.errors import UserError

_ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
_WITHOUT_SYSTEM = (
    "{% set system = messages[0].content if messages[0].role == 'system' else none %}"
    "{% for m in (messages[1:] if system is not none else messages) %}"
)
_CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_DEEPSEEK = (
    "<\uff5cbegin▁of▁sentence\uff5c>{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<\uff5cUser\uff5c>{{ m.content }}{% else %}"
    "<\uff5cAssistant\uff5c>{{ m.content.split('</think>')[-1] }}<\uff5cend▁of▁sentence\uff5c>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<\uff5cAssistant\uff5c>"
)
TEMPLATES = {
    "ChatML": "{% for m in messages %}" + _CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "Qwen-2": "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are Qwen."
    "<|im_end|>\n{% endif %}" + _CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "Qwen-3": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n"
    "</think>\n\n{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "Llama-2": _WITHOUT_SYSTEM + _ALTERNATE + "{% if m.role == 'user' %}<s>[INST] {% if loop.first and system is not "
    "none %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ m.content.strip() }} [/INST]{% else %} "
    "{{ m.content.strip() }} </s>{% endif %}{% endfor %}",
    "Llama-3": "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant"
    "<|end_header_id|>\n\n{% endif %}",
    "Mistral": "<s>" + _WITHOUT_SYSTEM + _ALTERNATE + "{% if m.role == 'user' %} [INST] {% if loop.first and system "
    "is not none %}{{ system }}\n\n{% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}"
    "{% endfor %}",
    "Mistral v3": "<s>" + _WITHOUT_SYSTEM + _ALTERNATE + "{% if m.role == 'user' %}[INST] {% if loop.last and system "
    "is not none %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content | trim }}</s>{% endif %}"
    "{% endfor %}",
    "Gemma": "<bos>"
    + _WITHOUT_SYSTEM
    + _ALTERNATE
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}"
    "\n{% if loop.first and system is not none %}{{ system }}\n\n{% endif %}{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "Phi-3": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
    "Zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "DeepSeek": _DEEPSEEK + "{% endif %}",
    "DeepSeek-R1": _DEEPSEEK + "<think>\n{% endif %}",
}
UNKNOWN = (  # a form that nobody has
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content | trim }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def render(template: str, messages, add_generation_prompt: bool = False, **how) -> str:
    """The text of messages."""
    return _compiled(template).render(messages=messages, add_generation_prompt=add_generation_prompt, **how)


@cache
def _compiled(template: str):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)

    def raise_exception(message):
        raise ValueError(message)

    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)


def tokenizer_of(template: str, tokens: Sequence[str] = ()):
    """What stands for a tokenizer with a chat template and special tokens."""
    return SimpleNamespace(
        bos_token=None,
        all_special_tokens=list(tokens),
        name_or_path="model",
        apply_chat_template=lambda messages, tokenize, **how: render(template, messages, **how),
    )


TALK = [
    {"role": "user", "content": "I lost my job."},
    {"role": "assistant", "content": "Oh no."},
    {"role": "user", "content": "Yes.\nToday."},
]
SYSTEM = {"role": "system", "content": "Be kind."}
FOLDS = ("Mistral", "Mistral v3", "Gemma")  # they write the system message into a message of the user
CONTEXT = " User: I lost my job.  AI: Oh no.  User: Yes.\nToday."
MARKS = (
    "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "</s>", "<s>", "<<SYS>>", "<start_of_turn>user", "<end_of_turn>",
    "<|eot_id|>", "<|user|>", "<|assistant|>", "<|end|>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<bos>",
    "<|start_header_id|>user<|end_header_id|>", "<|turn|>", "<|stop|>",
)  # fmt: skip

texts = st.text("abAI User:.,\n-'é日🙂\u00a0", max_size=12)
marked = st.builds("{}{}x{}".format, texts, st.sampled_from(MARKS), texts)
contents = st.one_of(texts, texts, texts, marked)
talks = st.lists(contents, min_size=1, max_size=6).map(
    lambda said: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
)


def reading(prompt, own=None):
    """A prompt as it is read; None if it is refused."""
    try:
        return read_prompt(prompt, 4, own)
    except UserError:
        return None
