"""The forms in which a language model reads prompts, written out."""

import pytest
from transformers import AutoTokenizer

from data_utils import make_prompts, read_corpus, split
from geli.nets.prompts import ChatFormat, Prompt, RawFormat
from geli.run.errors import UserError

# the forms of three models' templates, restated in as few words as they allow
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are SmolLM<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% set system = messages[0].role == 'system' %}{% for m in (messages[1:] if system else messages) %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}<s>[INST] {% if system and loop.first %}<<SYS>>\n{{ messages[0].content }}\n<</SYS>>\n\n"
    "{% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<stop>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)
TURNS = ((True, "Hi!"), (False, "Hello."), (False, "How are you?"), (True, "Fine."), (False, "Good."))


@pytest.fixture(scope="module")
def tokenizer(tiny):
    made = AutoTokenizer.from_pretrained(tiny / "llama")
    made.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<stop>"]})
    return made


@pytest.fixture
def chat(tokenizer):
    def chat(template: str) -> ChatFormat:
        tokenizer.chat_template = template
        form = ChatFormat(tokenizer)
        form.instruction = "Be kind."
        return form

    return chat


def written_out(form: ChatFormat, turns) -> str:
    return form._prompt(form.messages(turns))


def test_smollm2s_form(chat):
    form = chat(SMOLLM2)
    assert written_out(form, TURNS) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n"
        "<|im_start|>user\nHello. How are you?<|im_end|>\n<|im_start|>assistant\nFine.<|im_end|>\n"
        "<|im_start|>user\nGood.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert written_out(form, ()) == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>assistant\n"
    assert form.end == form.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_llama_2s_form_begins_with_a_user_message(chat):
    form = chat(LLAMA_2)
    assert written_out(form, TURNS) == (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHello. How are you? [/INST] Fine. </s><s>[INST] Good. [/INST]"
    )
    assert written_out(form, ()) == "<s>[INST] Be kind. [/INST]"
    assert form.end == form.tokenizer.eos_token_id


def test_a_form_without_system_messages_has_the_instruction_in_the_first_user_message(chat):
    form = chat(NO_SYSTEM)
    assert written_out(form, TURNS) == (
        "<start>user\nBe kind.\n\nHello. How are you?<stop>\n<start>model\nFine.<stop>\n"
        "<start>user\nGood.<stop>\n<start>model\n"
    )
    assert written_out(form, TURNS[:1]) == "<start>user\nBe kind.<stop>\n<start>model\n"
    assert form.end == form.tokenizer.convert_tokens_to_ids("<stop>")


def test_a_response_to_the_agents_own_turn_continues_it(chat):
    assert written_out(chat(SMOLLM2), TURNS[1:4]).endswith("<|im_start|>assistant\nFine.")


@pytest.mark.parametrize("template", [SMOLLM2, LLAMA_2, NO_SYSTEM])
def test_an_answer_follows_the_prompt_as_the_template_writes_it(template, chat):
    form, prompt = chat(template), Prompt("", "", "", turns=TURNS)
    whole = form._render([*form.messages(TURNS), {"role": "assistant", "content": "so good"}])
    ids = form.encode(prompt, 1000) + form.answer(prompt, "so good")
    assert ids == form._tokens(whole)[: len(ids)] and ids[-1] == form.end
    assert form.tokenizer.decode(form.answer(prompt, "so good"), skip_special_tokens=True).strip() == "so good"


def test_a_long_prompt_loses_whole_turns_from_the_left(chat):
    form = chat(SMOLLM2)
    prompt = Prompt("", "", "", turns=tuple((i % 2 == 0, f"turn {i:02d}") for i in range(30)))
    limit = len(form.encode(prompt, 10_000)) // 2
    kept = form.tokenizer.decode(form.encode(prompt, limit))
    whole = form.tokenizer.decode(form.encode(prompt, 10_000))
    assert len(form.encode(prompt, limit)) <= limit
    first = next(i for i in range(30) if f"turn {i:02d}" in kept)
    assert 10 < first < 20 and form.messages(prompt.turns[first:])[0]["role"] == "system"
    assert all(f"turn {i:02d}" in kept for i in range(first, 30)) and whole.endswith(kept[-40:])


def test_prompts_of_conversations_have_their_turns(sample):
    trajectories = split(read_corpus(sample, "overall_affect"), 40)[0][:2]
    for prompt in make_prompts(trajectories, 3):
        assert len(prompt.turns) <= 3
        names = {True: "AI", False: "User"}
        assert prompt.context == " ".join(f" {names[is_agent]}: {said}" for is_agent, said in prompt.turns)


def test_a_tokenizer_without_a_usable_template_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages"
    with pytest.raises(UserError, match=r"--prompt_format chat: the chat template of .* fails: unexpected end"):
        ChatFormat(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"--prompt_format chat: the tokenizer of .* has no chat template; use raw"):
        ChatFormat(tokenizer)


def test_the_raw_form_is_the_text(tokenizer):
    prompt = Prompt("You are AI. User: hi AI:", "", "")
    form = RawFormat(tokenizer)
    assert form.encode(prompt, 1000) == tokenizer(prompt.text).input_ids
    answer = form.answer(prompt, "good")
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == "good" and answer[-1] == form.end
