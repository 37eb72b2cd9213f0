"""What real models and tokenizers do to programs that train them: each is used as it is to be, or refused in a line."""

import json
import shutil

import pytest
import torch
from cases import case
from safetensors.torch import load_file, save_file
from small_models import small_model
from transformers import AutoTokenizer, BertConfig, BertLMHeadModel

from geli.nets.encoder import load_encoder
from geli.nets.options import Adapter
from geli.nets.policy import load_policy
from geli.nets.prompts import ChatFormat, Prompt
from geli.rl.rollout import draw_uniforms, rollout
from geli.run.errors import UserError
from geli.run.options import WANDB_MODES, RunOptions, build_parser, parse

PROMPTS = [
    Prompt(f"You are AI.{text} AI:", text, "", turns=((False, "hi"),)) for text in (" User: hi", " User: how are you?")
]


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of a small Llama, to be changed."""
    return shutil.copytree(tiny / "llama", tmp_path / "model")


def load(folder, prompt_format="raw", **more):
    torch.manual_seed(0)
    adapter = Adapter(4, 8, targets=more.pop("targets", None))
    return load_policy(str(folder), adapter, torch.float32, prompt_format=prompt_format, **more)


def train_a_step(policy):
    """Samples responses, and takes the gradient of their log-probabilities."""
    sampled = rollout(policy, PROMPTS, draw_uniforms(2, 6, torch.Generator().manual_seed(0)))
    policy(*sampled.rows([0, 1]))[0].sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.trainable())
    return sampled


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tokenizer(folder, change):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)


def refused(folder, message, **more):
    with pytest.raises(UserError, match=message) as error:
        load(folder, **more)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def test_cases_a_padding_token_without_an_embedding_is_replaced(model):
    change_tokenizer(model, lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "<padding>"}))
    policy = load(model)
    assert policy.pad == policy.end == policy.tokenizer.pad_token_id
    train_a_step(policy)
    train_a_step(load(case("models/m01_pad_not_resized")))


def test_cases_a_tokenizer_that_adds_an_end_token_ends_no_prompt(model):
    state = json.loads((model / "tokenizer.json").read_text())
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    state["post_processor"] = {
        "type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}, end],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}},
    }  # fmt: skip
    (model / "tokenizer.json").write_text(json.dumps(state))
    assert AutoTokenizer.from_pretrained(model)("a").input_ids[-1] == 2
    for folder in (model, case("models/m02_adds_eos")):
        policy = load(folder)
        for limit in (1000, 12):
            ids = policy.format.encode(PROMPTS[1], limit)
            assert policy.tokenizer.decode(ids).endswith(" AI:") and len(ids) <= limit
        answer = policy.format.answer(PROMPTS[1], "well")
        assert answer.count(policy.end) == 1 and answer[-1] == policy.end
        train_a_step(policy)


def test_cases_a_model_without_an_end_token_is_refused(model):
    change_tokenizer(model, lambda tokenizer: setattr(tokenizer, "eos_token", None))
    refused(model, "expected an end token, found none: name it as eos_token in tokenizer_config.json")
    refused(case("models/m03_no_eos"), "expected an end token")


def test_cases_the_end_is_a_set(model):
    change_json(model / "generation_config.json", eos_token_id=[2, 7])
    policy = load(model)
    assert policy.ends == (2, 7) and policy.end == 2
    assert policy.model.generation_config.eos_token_id == [2, 7]  # where TRL's trainers look
    policy.save_merged(model.parent / "merged")
    assert load(model.parent / "merged").ends == (2, 7)


# ---------------------------------------------------------------------------------------------------------------------
# Reasoning models


def test_cases_prompts_ask_for_no_thought():
    policy = load(case("models/c03_think"), "chat")
    (ids,) = policy.tokenize(PROMPTS[:1])[0].tolist()
    assert policy.tokenizer.decode(ids).endswith("<|turn|>assistant\n<think>\n\n</think>\n\n")
    assert policy.tokenizer.decode(policy.format.answer(PROMPTS[0], "Hi.")) == "Hi.<|stop|>"
    train_a_step(policy)


@pytest.mark.parametrize("asked", ["enable_thinking", "thinking"])
def test_cases_a_template_that_always_thinks_is_refused_and_one_with_a_mode_is_asked_for_it(tiny, asked):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "llama")
    thinks = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}"
    thinks += "assistant:"
    tokenizer.chat_template = f"{thinks}<think>\n{{% endif %}}"
    with pytest.raises(UserError, match="begins every response with a thought"):
        ChatFormat(tokenizer)
    tokenizer.chat_template = f"{thinks}{{% if {asked} is undefined or {asked} %}}<think>\n{{% endif %}}{{% endif %}}"
    assert tokenizer.decode(ChatFormat(tokenizer).encode(PROMPTS[0], 1000)).endswith("assistant:")


# ---------------------------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize("name", ["v01_gemma3_vlm", "v07_mixtral"])
def test_cases_other_architectures_are_trained_and_loaded_again(name, tmp_path):
    policy = load(case(f"models/{name}"))  # of a vision-text model the text model
    train_a_step(policy)
    policy.save(tmp_path / "saved")
    load(case(f"models/{name}")).load(tmp_path / "saved")
    policy.save_merged(tmp_path / "merged")
    train_a_step(load(tmp_path / "merged"))


def test_cases_an_architecture_that_fails_is_refused_in_a_line(model, monkeypatch):
    def fail(self, *_, **__):
        raise IndexError("index out of range\nin self")

    monkeypatch.setattr("transformers.LlamaModel.forward", fail)
    refused(model, "no policy can be made of a model of the kind llama: index out of range$")


def test_cases_a_model_that_sees_what_follows_is_no_policy(tiny, tmp_path):
    config = BertConfig(
        vocab_size=1000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(tiny / "llama").save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", "of the kind bert predicts tokens from those that follow, so it cannot write")


def test_cases_settings_of_generation_that_do_not_fit_together_are_saved_all_the_same(model):
    change_json(model / "generation_config.json", temperature=0.9, top_p=0.6)  # as Llama-2's, without do_sample
    load(model).save_merged(model.parent / "merged")
    load(model.parent / "merged")


def test_cases_a_pointer_of_git_lfs_is_named(model):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (model / "model.safetensors").write_text(pointer)
    refused(model, "found a pointer to it: run git lfs pull in its folder")


def test_cases_the_modules_of_the_adapter_can_be_named(model):
    policy = load(model, targets=["k_proj", "down_proj"])
    changed = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in policy.named_parameters() if "lora_" in name}
    assert changed == {"k_proj", "down_proj"}
    refused(model, "name other modules with --lora_target_modules", targets=["no_such_proj"])
    policy.save(model.parent / "saved")
    with pytest.raises(UserError, match="an adapter of other modules: give --lora_target_modules down_proj k_proj"):
        load(model).load(model.parent / "saved")


def test_cases_weights_that_are_not_finite_are_named(model):
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("up_proj.weight"))
    weights[name][3, 1] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    refused(model, f"its weights hold values that are not finite, the first in {name}")


def test_cases_a_quantized_model_is_refused_by_its_method(model):
    change_json(model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(model, r"quantized \(gptq\): expected weights in float")


def test_cases_an_encoders_adapter_with_other_embeddings_is_refused_with_both_shapes(sample, tmp_path):
    adapter = shutil.copytree(case("models/e4_resized"), tmp_path / "adapter")
    base = small_model("llama-encoder", tmp_path / "base", sample)
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    with pytest.raises(UserError, match=r"262, 32.*\d+, 32|\d+, 32.*262, 32"):
        load_encoder(str(adapter))


@pytest.mark.parametrize("mode", ["offine", *WANDB_MODES])
def test_cases_a_mistake_in_wandb_mode_is_answered_at_once(mode, monkeypatch, capsys):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Options:
        run: RunOptions = RunOptions()

    monkeypatch.setenv("WANDB_MODE", mode)
    if mode in WANDB_MODES:
        parse(build_parser("", Options()), Options(), [])
        return
    with pytest.raises(SystemExit):
        parse(build_parser("", Options()), Options(), [])
    assert "WANDB_MODE=offine: expected online, offline, disabled in the environment" in capsys.readouterr().err
