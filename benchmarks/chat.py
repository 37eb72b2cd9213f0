"""How soon a reply begins, against transformers' `generate`; and what its reward costs.

    python benchmarks/chat.py --policy FOLDER --encoder FOLDER [--prompts 20]

Work: replies to conversations of ten turns, by a policy with its adapter, whose rewards come from an untrained head on
the encoder. Peer: `model.generate` of the same model on the same token ids, sampling one token. Both take turns, prompt
by prompt. Prints medians and quartiles of the seconds, the ratio of the first token to the peer's, and the reward's
share of a reply's time.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

import numpy as np
import torch

from apps.chat.partner import Partner
from apps.chat.talk import Talk, TalkTurn
from geli.nets.encoder import load_encoder
from geli.nets.options import Adapter
from geli.nets.policy import load_policy
from geli.reward import GELIReward
from geli.run.console import format_table
from geli.run.distributed import make_accelerator
from models import RewardHead, RewardHeadConfig

SENTENCES = (
    "I spent the whole weekend in the garden, and now my back hurts.", "Oh no, did you at least enjoy the weather?",
    "Yes, and the tomatoes are nearly ripe.", "That is lovely, I have never grown any vegetables myself.",
    "You should try it, a pot on the balcony is enough to begin with.", "Which kind would you recommend to a beginner?",
    "Radishes, because you can eat them after four weeks.", "Four weeks sounds like something that I could wait for.",
    "If they do not grow, you have lost nothing but a bag of seeds.", "What else do you do when you are not outside?",
)  # fmt: skip


class Beginning(Partner):
    """A partner that remembers when the first token of the last reply was sampled."""

    def begin(self) -> None:
        """A reply is asked for."""
        self.asked, self.first = time.perf_counter(), None

    def note(self, sample):
        """`sample` of the policy, noting the time."""

        def run(*arguments):
            token = sample(*arguments)
            self.first = self.first or time.perf_counter() - self.asked
            return token

        return run


def new_talk(partner: Partner, scorer: GELIReward, number: int) -> Talk:
    """A conversation of ten turns that differs from the others, with a message that waits for its reply."""
    talk = Talk(partner, scorer, seed=number)
    said = [SENTENCES[(number + i) % len(SENTENCES)] for i in range(9)]
    talk.turns = [TalkTurn(i % 2 == 1, text, i, i + 1) for i, text in enumerate(said)]
    for turn in talk.replies:
        turn.features = torch.zeros(scorer.head.config.hidden)
    return talk


def time_generate(talk: Talk) -> dict[str, float]:
    """Seconds of `generate` for the first token."""
    policy = talk.partner.policy
    query, mask = policy.tokenize([talk.prompt(len(talk.turns))])
    settings = dict(max_new_tokens=1, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=policy.pad)
    started = time.perf_counter()
    policy.model.generate(input_ids=query, attention_mask=mask, **settings)
    return {"generate, one token": time.perf_counter() - started}


def time_reply(talk: Talk) -> dict[str, float]:
    """Seconds until the first token and the first text of a reply, of the whole reply, and of its reward."""
    talk.partner.begin()
    started, shown = time.perf_counter(), None
    for text in talk.reply():
        said = time.perf_counter() - started
        shown = shown or (said if text else None)
    talk.rewards()
    whole = time.perf_counter() - started
    return {"first token": talk.partner.first, "first text": shown or said, "reply": whole, "reward": whole - said}


def main() -> None:
    """Times both."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--policy", required=True, help="hub id or folder of a language model")
    parser.add_argument("--encoder", required=True, help="hub id or folder of a text encoder")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--prompt_format", choices=("raw", "chat"), default="raw")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    accelerator = make_accelerator(args.device, "auto", cpu_dtype="float32")
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    policy = load_policy(args.policy, Adapter(16, 32), dtype, prompt_format=args.prompt_format).to(accelerator.device)
    partner = Beginning(policy, "policy", tuned=True)
    policy.sample = partner.note(policy.sample)
    encoder = load_encoder(args.encoder).to(accelerator.device)
    config = RewardHeadConfig("small_model_shrink", encoder.hidden_size, args.encoder, False, 1024, 20, 2, None)
    scorer = GELIReward(encoder, RewardHead(config).eval().to(accelerator.device), autocast=accelerator.autocast)
    for warm_up in range(2):
        time_generate(new_talk(partner, scorer, warm_up))
        time_reply(new_talk(partner, scorer, warm_up))

    found: dict[str, list[float]] = {}
    for number in range(args.prompts):
        talk = new_talk(partner, scorer, number)
        for measure in (time_generate, time_reply)[:: 1 if number % 2 else -1]:
            for name, seconds in measure(talk).items():
                found.setdefault(name, []).append(seconds)
            talk.turns = talk.turns[:9]
    rows = []
    for name, seconds in found.items():
        low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75])
        rows.append({"seconds": name, "median": median, "quartiles": f"{low:.4g} to {high:.4g}"})
    print(format_table(rows, f"{args.policy} and {args.encoder} on {accelerator.device}, {args.prompts} prompts"))
    first, text, peer = (np.array(found[name]) for name in ("first token", "first text", "generate, one token"))
    share = np.array(found["reward"]) / np.array(found["reply"])
    print(f"first token: {np.median(first / peer):.2f} times generate; first text: {np.median(text / peer):.2f} times")
    print(f"the reward's share of a reply's time: median {np.median(share):.1%}, largest {share.max():.1%}")


if __name__ == "__main__":
    main()
