"""Trains a little on a device that this machine does not have, and that computes no float64, as Apple's MPS does not.

    python tests/support/pretended_device.py FOLDER

The device takes PyTorch's place for backends of others. Its tensors are on the CPU, behind a wrapper that says that
they are on the device. What is computed from them is on it too. Mixing them with tensors of the CPU is an error, as on
a real accelerator, and so is every operation whose result is float64. This is a process of its own, because PyTorch
cannot forget a device. Prints a line for each part that has run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, whose modules are imported below

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from turn_sets import trajectory, turn_set

from experiments.known_optimum import make_model, prompts, share_of_good_words
from geli.nets.encoder import load_encoder
from geli.nets.features import TurnFeatures
from geli.nets.options import Adapter
from geli.nets.policy import load_policy
from geli.reward import GELIReward
from geli.rl.evaluation import evaluate_policy
from geli.run.distributed import make_accelerator, seed_everything
from models import PPO, PPOConfig, RewardHead, RewardHeadConfig
from train_reward_GELI import GELITraining, GELITrainingOptions
from train_reward_LI_only import LITraining, LITrainingOptions

_setup_privateuseone_for_python_backend("pretended")
DEVICE = torch.device("pretended:0")
ATEN = torch.ops.aten
# what may have tensors of both devices: copies, and CPU indices into a tensor of an accelerator
BOTH = {ATEN.copy_.default, ATEN._to_copy.default, ATEN.index.Tensor, ATEN.index_put_.default}


class OnDevice(torch.Tensor):
    """A tensor that says that it is on the device. `inner`: its values, on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE, requires_grad=inner.requires_grad,
        )  # fmt: skip
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()


class Pretended(TorchDispatchMode):
    """Makes tensors on the device where that is asked for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """What an operation of PyTorch gives; on the device if it is asked for there or takes tensors from there."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
    on_device = len(on_cpu) < len(tensors)
    if on_device and function not in BOTH and any(tensor.dim() for tensor in on_cpu):
        raise RuntimeError(f"{function}: tensors on two devices")
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda leaf: leaf.inner if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
    found = function(*args, **kwargs)
    return tree_map(placed, found) if on_device else found


def placed(value):
    """A result on the device."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.float64:
        raise TypeError("the device has no float64")
    return OnDevice(value)


def ppo(model: Path, folder: Path, accelerator) -> None:
    """A PPO step on the rewards of a head, and an evaluation."""
    policy = load_policy(str(model), Adapter(4, 8), torch.float32).to(DEVICE)
    encoder = load_encoder(str(model)).to(DEVICE)
    head = RewardHead(head_config(encoder)).eval().to(DEVICE)
    score = GELIReward(encoder, head, autocast=accelerator.autocast).score
    limits = dict(min_new_tokens=4, max_new_tokens=4)
    settings = PPOConfig(batch_size=4, mini_batch_size=2, gradient_accumulation_steps=1, **limits)
    asked = [prompt._replace(context=prompt.text, human="w01") for prompt in prompts(np.random.default_rng(0), 4)]
    logged, _ = PPO(policy, score, settings, accelerator, seed=0).step(asked)
    assert logged["optimizer_steps"] == 2 and logged["gradient_norm"] > 0
    evaluation = evaluate_policy(
        policy, score, asked, accelerator, seed=0, batch_size=4, mini_batch_size=2, gold=share_of_good_words, **limits
    )
    assert evaluation.metrics["kl"] != 0


def head_config(encoder) -> RewardHeadConfig:
    return RewardHeadConfig("small_model_shrink", encoder.hidden_size, None, False, 64, 1, 1, None)


TURNS = turn_set(trajectory("a", 70, ["happiness", "neutral"]), trajectory("b", 20, ["sadness", "happiness"]))


def stage_1(model: Path, folder: Path, accelerator) -> None:
    """A step of stage 1 and its validation."""
    encoder = load_encoder(str(model)).to(DEVICE)
    head = RewardHead(head_config(encoder)).to(DEVICE)
    options = LITrainingOptions(epochs=2, batch_size=5, contrastive=True)
    stage = LITraining(encoder, head, TURNS, TURNS, options, accelerator, 0, lambda: None)
    for step in (1, 2):
        logged = stage.step(step)
        assert logged["train/gradient_norm"] > 0 and stage.after_step(step, logged) == (step == 2)


def stage_2(model: Path, folder: Path, accelerator) -> None:
    """A step of stage 2 and its validation, with a frozen encoder and with one that is trained."""
    for unfreeze in (False, True):
        encoder = load_encoder(str(model)).to(DEVICE)
        features = TurnFeatures(encoder, accelerator, folder / "cache", frozen=not unfreeze)
        head = RewardHead(head_config(encoder))
        options = GELITrainingOptions(epochs=1, batch_size=2, ge_weight=0.5, unfreeze=unfreeze, loss_scale="normalized")
        stage = GELITraining(head, features, TURNS, TURNS, options, accelerator, 0, lambda: None)
        logged = stage.step(1)
        assert logged["train/gradient_norm"] > 0 and stage.after_step(1, logged)


def main(folder: Path) -> None:
    """Runs all parts."""
    seed_everything(0)
    accelerator = make_accelerator("cpu", "float32")
    accelerator.state.device = DEVICE
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor goes through `Pretended` too
    torch.inference_mode = torch.no_grad  # in inference mode PyTorch makes no wrappers
    model = make_model(folder / "llama", seed=0)
    for part in (ppo, stage_1, stage_2):
        with Pretended():
            part(model, folder, accelerator)
        print(part.__name__, "has run")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
