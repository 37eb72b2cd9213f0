"""Options that several apps have."""

import argparse
import re

from geli.run.options import OUTPUT_DIR, runs_folder

SERVER_URL = re.compile(r"https?://([\w.-]+|\[[\da-fA-F:.]+\])(:(?P<port>\d{1,5}))?(/[^\s?#]*)?", re.ASCII)


def server_url(text: str) -> str:
    """The address of an OpenAI-compatible server, up to `/v1`."""
    match = SERVER_URL.fullmatch(text)
    if not match or int(match["port"] or 1) >= 2**16:
        raise argparse.ArgumentTypeError("an address such as https://host/v1 is expected, without a user or key in it")
    return text


def add_head_options(parser: argparse.ArgumentParser) -> None:
    """Options of commands that compute the rewards of a saved head: where it and its encoder are, and on what."""
    parser.add_argument("--lang_model_path", help="encoder of a published head, which records none")
    parser.add_argument("--output_dir", default=runs_folder(), help=f"folder of the runs {OUTPUT_DIR}")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto is a GPU if there is one"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto is bfloat16 on a GPU that has it"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code that a model's folder or hub repository brings along"
    )
