"""Talk to a policy in the terminal or on a page, and collect what is said as training data if people agree.

    python -m apps.chat --weights rlmf_weights/GELI_llama_200
    python -m apps.chat --weights rlmf_weights/GELI_llama_200 --web --compare --collect my_talks

Shows each reply as it grows, and its turn reward by the head that the policy was trained with. --help lists the
options, and /help the commands of a conversation.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from apps.chat.survey import new_user_id, user_id
from apps.faces import FACE_MODELS
from apps.options import add_head_options
from geli.data.questions import QUESTIONS
from geli.run.errors import run
from geli.run.options import new_parser, non_negative_int, positive_int, seed

# options of the page, and their defaults
WEB = {"host": "127.0.0.1", "port": 7860, "people": 4, "questions": (), "camera": False, "face_model": "fer"}


def parse_options(argv: Sequence[str] | None = None):
    """The options on the command line."""
    parser = new_parser("Talk to a policy, and collect what is said if people agree.")
    parser.add_argument(
        "--weights", required=True, help="a checkpoint rlmf_weights/EXP_MODEL_STEP, or any language model: a hub id, a "
        "folder, or a short name as of train_rl_GELI.py (no default)",
    )  # fmt: skip
    parser.add_argument(
        "--base_model", help="the model under the checkpoint's adapter, hub id or folder (default: the recorded one)"
    )
    parser.add_argument(
        "--compare", action="store_true", help="also show what the base policy replies; with --web the two "
        "are side by side, and nobody is told which is which before the end",
    )  # fmt: skip
    parser.add_argument(
        "--reward_path", metavar="HEAD", help="run name or path of the reward head (default: the one that the policy "
        "was trained with)",
    )  # fmt: skip
    parser.add_argument(
        "--collect", type=Path, metavar="DIR", help="store rated conversations in this folder, if people agree "
        "(default: store nothing)",
    )  # fmt: skip
    parser.add_argument(
        "--reward_class", choices=QUESTIONS, metavar="CLASS", help="the survey question at the end, one of "
        f"{', '.join(QUESTIONS)} (default: the reward head's, else overall_affect)",
    )  # fmt: skip
    parser.add_argument("--user", type=user_id, help="id of the person who talks (default: a random one)")
    parser.add_argument(
        "--context_turns", type=positive_int, help="turns of history that the policy reads (default: as in training, "
        "else 10)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt_format", choices=("raw", "chat"), help="how the policy reads the history (default: as in training, "
        "else raw)",
    )  # fmt: skip
    parser.add_argument("--seed", type=seed, help="seed of the replies' sampling (default: another every time)")
    add_head_options(parser)
    add_page_options(parser)
    options = parser.parse_args(argv)
    complete_page_options(parser, options)
    return options


def add_page_options(parser: argparse.ArgumentParser) -> None:
    """The options of `--web`."""
    web = parser.add_argument_group("a page for browsers")
    web.add_argument("--web", action="store_true", help="serve a page instead of talking in the terminal")
    web.add_argument("--host", help="address to listen on; if others can reach it, the link has a token (default: "
        "127.0.0.1, this machine alone)",
    )  # fmt: skip
    web.add_argument("--port", type=non_negative_int, help="to listen on; 0: a free one (default: 7860)")
    web.add_argument("--people", type=positive_int, help="who can talk at once; others wait in a queue (default: 4)")
    web.add_argument(
        "--questions", nargs="+", choices=QUESTIONS, metavar="CLASS", help="further questions at the end, which "
        "need not be answered (default: none)",
    )  # fmt: skip
    web.add_argument(
        "--camera", action="store_true", default=None, help="offer people at this machine to read their faces; needs "
        "--collect (default: no)",
    )  # fmt: skip
    web.add_argument(
        "--face_model", choices=FACE_MODELS, help="what reads faces: "
        + "; ".join(f"{name}, {model.help}" for name, model in FACE_MODELS.items()) + " (default: fer)",
    )  # fmt: skip


def complete_page_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses options of the page without the page, and sets the defaults of the others."""
    given = [name for name in WEB if getattr(options, name) is not None]
    if given and not options.web:
        parser.error(f"--{given[0]} is for the page: add --web")
    if options.face_model and not options.camera:
        parser.error("--face_model is for the camera: add --camera")
    if options.camera and not options.collect:
        parser.error("--camera: faces are for training data, so name a folder with --collect")
    for name in WEB.keys() - given:
        setattr(options, name, WEB[name])


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else None

from apps.chat.camera import Camera
from apps.chat.collect import Collection
from apps.chat.page import Survey
from apps.chat.partner import Partner, is_checkpoint, load_partner, training_of
from apps.chat.sessions import Sessions
from apps.chat.talk import Talk
from apps.chat.terminal import Terminal
from apps.chat.web import serve
from apps.packages import install, require
from apps.sockets import listen
from geli.heads import find_head
from geli.nets.pretrained import check_exists
from geli.reward import GELIReward
from geli.run.distributed import make_accelerator
from geli.run.errors import UserError


def find_reward(options) -> Path | None:
    """The reward head's file: the named one, else the one that the policy was trained with; None if there is none."""
    if options.reward_path:
        return find_head(options.reward_path, options.output_dir)
    path = training_of(options.weights).reward_head
    if path is None:
        print(f"No rewards: no head is recorded beside {options.weights}; name one with --reward_path")
    elif not path.is_file():
        print(f"No rewards: {options.weights} was trained with {path}, which is not there; name it with --reward_path")
        return None
    return path


def load(options) -> tuple[Partner, GELIReward | None]:
    """The policy, and what gives rewards."""
    if options.compare and not is_checkpoint(options.weights):
        raise UserError(f"--compare: {options.weights} has no adapter, so there is no base policy beside it")
    accelerator, trust = make_accelerator(options.device, options.dtype, cpu_dtype="float32"), options.trust_remote_code
    check_exists(options.weights, "--weights")
    head = find_reward(options)
    print(f"Loading {options.weights} …", flush=True)
    partner = load_partner(
        options.weights, accelerator, cache_dir=Path(options.output_dir) / "cache", base_model=options.base_model,
        prompt_format=options.prompt_format, context_turns=options.context_turns, trust_remote_code=trust,
    )  # fmt: skip
    return partner, head and GELIReward.load(
        head, device=options.device, dtype=options.dtype, lang_model_path=options.lang_model_path,
        trust_remote_code=trust, cache_size=0,
    )  # fmt: skip


def main(options) -> None:
    """Loads the policy and its reward, and talks."""
    if options.web:
        listener = listen(options.host, options.port)
        require("gradio", "--web", install("chat"))
    collection = options.collect and Collection(options.collect)
    camera = Camera(options.face_model) if options.camera else None
    partner, scorer = load(options)
    reward_class = options.reward_class or (scorer and scorer.head.config.reward_class) or "overall_affect"
    new_talk = partial(Talk, partner, scorer)
    if options.web:
        sessions = Sessions(new_talk, options.compare, collection, options.people, options.user, options.seed)
        more = [question for question in options.questions if question != reward_class]
        serve(sessions, Survey(reward_class, more), camera, options.host, listener)
    else:
        settings = {} if options.seed is None else {"seed": options.seed}
        new_talk = partial(new_talk, user=options.user or new_user_id(), **settings)
        Terminal(new_talk, options.compare, collection, reward_class).run()


if __name__ == "__main__":
    run(partial(main, OPTIONS))
