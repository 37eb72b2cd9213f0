"""Run in two processes by test_processes.py: models of several architectures, sharded, against whole copies, where one
process has fewer rows or none, and in one pass or several. Usage: sharded_kinds.py FOLDER_OF_SMALL_MODELS"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from geli.nets.encoder import load_encoder
from geli.nets.policy import load_policy
from geli.run.distributed import make_accelerator
from geli.run.gradients import sum_gradients
from geli.run.sharding import shard

ENCODERS, POLICIES = ("longformer", "longt5", "llama-encoder"), ("gpt2", "t5-tied")
PAIRS = [(" User: hello there", "AI: I am fine"), (" User: a", "AI: b c d"), (" User: what is it", "AI: nothing much")]


def gradients(model, parameters, loss, accelerator) -> list[torch.Tensor]:
    """Gradients of `loss`, added up over the processes; zeros where there are none."""
    for p in parameters:
        p.grad = None
    if loss.requires_grad:
        loss.backward()
    sum_gradients(parameters, accelerator)
    found = [torch.zeros(p.shape) if p.grad is None else p.grad for p in parameters]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]


def compare(kind: str, found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=lambda text: f"{kind}: {text}")


def main() -> None:
    folder, accelerator = Path(sys.argv[1]), make_accelerator("cpu", "float32")
    rank = accelerator.process_index
    for kind in ENCODERS:
        whole = load_encoder(str(folder / kind)).eval()
        other = shard(load_encoder(str(folder / kind)), accelerator).eval()
        parameters = whole.trainable(), other.trainable()
        tokens = whole.tokenize(PAIRS)
        weights = torch.linspace(-1, 1, whole.hidden_size)
        for budget in (None, 12):
            whole.tokens_per_batch = other.tokens_per_batch = budget
            for mine in (tokens[rank::2], tokens if rank else []):
                features = whole.encode_with_gradients(mine), other.encode_with_gradients(mine)
                compare(kind, (features[1], other.encode(mine)), (features[0], features[0].detach()))
                both = zip((whole, other), parameters, features, strict=True)
                first, second = (gradients(m, p, (f @ weights).sum(), accelerator) for m, p, f in both)
                compare(kind, second, first)
    for kind in POLICIES:
        torch.manual_seed(0)
        whole = load_policy(str(folder / kind), 4, 8, torch.float32)
        other = load_policy(str(folder / kind), 4, 8, torch.float32)
        other.load_state_dict(whole.state_dict())
        shard(other, accelerator)
        mine = [[0], [1, 2]][rank]
        query = whole.tokenize([("hello there", "a b c d e", "what is it now")[i] for i in mine])
        uniforms = torch.rand(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[mine]
        response, _ = whole.generate(*query, uniforms)
        assert torch.equal(other.generate(*query, uniforms)[0][:, : response.shape[1]], response), kind
        for rows in (slice(None), slice(0, 0 if rank else None)):
            inputs = [x[rows] for x in (*query, response, torch.ones_like(response))]
            seen = [m(*inputs) for m in (whole, other)]
            compare(kind, seen[1], seen[0])
            losses = [s[0].sum() + s[1].sum() for s in seen]
            both = zip((whole, other), losses, strict=True)
            first, second = (gradients(m, m.trainable(), loss, accelerator) for m, loss in both)
            compare(kind, second, first)
    print("compared: " + " ".join((*ENCODERS, *POLICIES)))


if __name__ == "__main__":
    main()
