"""The options of the closed loop and their defaults, which its command line takes from here."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoopOptions:
    """Options of the experiment; those of the commands are in `reward_commands` and `policy_command`.

    Attributes:
        out: folder of everything. data_dir: corpus in CANDOR's layout. encoder: hub id or folder, of the heads.
        policy: `--model_name`. seeds: of everything but the planted corpus. algorithms: of `--algo`, or best-of-N; all
            rewards are tried with the first of them and with best-of-N, GELI with all.
        steps: of training at most. prompts: held-out prompts. device: `--device`.
        dtype: `--dtype` of the policies. target_kl: nats a response; of each run the checkpoint is
            evaluated whose KL was closest to it.
    """

    out: Path
    data_dir: str
    encoder: str
    policy: str = "smollm2"
    seeds: tuple[int, ...] = (0, 1, 2)
    algorithms: tuple[str, ...] = ("ppo", "best-of-8", "rloo", "grpo")
    steps: int = 16
    prompts: int = 256
    target_kl: float = 5.0
    device: str = "cpu"
    dtype: str = "auto"
