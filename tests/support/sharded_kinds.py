"""A job of worker.py: models of several architectures, sharded, against whole copies, where one process has fewer rows
or none, and in one pass or several."""

from pathlib import Path

import torch

from geli.nets.encoder import load_encoder
from geli.nets.options import Adapter
from geli.nets.policy import load_policy
from geli.nets.prompts import Prompt
from geli.run.distributed import make_accelerator
from geli.run.gradients import sum_gradients
from geli.run.sharding import is_part, shard

ENCODERS, POLICIES = ("longformer", "longt5", "llama-encoder"), ("gpt2", "t5-tied")
PAIRS = [(" User: hello there", "AI: I am fine"), (" User: a", "AI: b c d"), (" User: what is it", "AI: nothing much")]


def parse_options(argv: list[str]) -> Path:
    """The folder of the small models."""
    return Path(argv[0])


def gradients(parameters, loss, accelerator) -> list[torch.Tensor]:
    """Gradients of `loss`, summed over the processes; zeros where there are none."""
    for p in parameters:
        p.grad = None
    if loss.requires_grad:
        loss.backward()
    sum_gradients(parameters, accelerator)
    gradients = [torch.zeros(p.shape) if p.grad is None else p.grad for p in parameters]
    return [gradient.full_tensor() if is_part(gradient) else gradient for gradient in gradients]


def compare(kind: str, found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=lambda text: f"{kind}: {text}")


def compare_encoder(kind: str, path: str, accelerator) -> None:
    whole, other = load_encoder(path).eval(), shard(load_encoder(path), accelerator).eval()
    parameters = whole.trainable(), other.trainable()
    tokens, rank = whole.tokenize(PAIRS), accelerator.process_index
    weights = torch.linspace(-1, 1, whole.hidden_size)
    for budget in (None, 12):
        whole.tokens_per_batch = other.tokens_per_batch = budget
        for mine in (tokens[rank::2], tokens if rank else []):
            features = whole.encode_with_gradients(mine), other.encode_with_gradients(mine)
            compare(kind, (features[1], other.encode(mine)), (features[0], features[0].detach()))
            both = zip(parameters, features, strict=True)
            first, second = (gradients(p, (f @ weights).sum(), accelerator) for p, f in both)
            compare(kind, second, first)


def compare_policy(kind: str, path: str, accelerator) -> None:
    torch.manual_seed(0)
    whole, other = (load_policy(path, Adapter(4, 8), torch.float32) for _ in range(2))
    other.load_state_dict(whole.state_dict())
    shard(other, accelerator)
    mine = [[0], [1, 2]][accelerator.process_index]
    query = whole.tokenize([Prompt(("hello there", "a b c d e", "what is it now")[i], "", "") for i in mine])
    uniforms = torch.rand(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[mine]
    response, *_ = whole.generate(*query, uniforms)
    assert torch.equal(other.generate(*query, uniforms)[0][:, : response.shape[1]], response), kind
    for rows in (slice(None), slice(0, 0 if accelerator.process_index else None)):
        inputs = [x[rows] for x in (*query, response, torch.ones_like(response))]
        seen = [m(*inputs) for m in (whole, other)]
        compare(kind, seen[1], seen[0])
        losses = [s[0].sum() + s[1].sum() for s in seen]
        both = zip((whole, other), losses, strict=True)
        first, second = (gradients(m.trainable(), loss, accelerator) for m, loss in both)
        compare(kind, second, first)


def main(folder: Path) -> None:
    accelerator = make_accelerator("cpu", "float32")
    for kind in ENCODERS:
        compare_encoder(kind, str(folder / kind), accelerator)
    for kind in POLICIES:
        compare_policy(kind, str(folder / kind), accelerator)
    print("compared: " + " ".join((*ENCODERS, *POLICIES)))
