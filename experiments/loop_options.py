"""The options of the closed loop and their defaults, which its command line takes from here."""

from dataclasses import dataclass
from pathlib import Path

SMALL = "small"  # the policy that the loop trains from scratch


@dataclass(frozen=True)
class LoopOptions:
    """Options of the experiment; those of the commands are in `head_commands` and `policy_command`.

    Attributes:
        out: folder of everything. data_dir: corpus in CANDOR's layout. encoder: hub id or folder, of the heads.
        policy: `small`, a Llama of 2.3 million weights that tools/tiny_models.py trains on the corpus, or as
            `--model_name`. prompt_format: `--prompt_format` of another policy than `small`, which reads raw text.
        seeds: of everything but the planted corpus and the policy.
        rewards: what policies are trained on. Behind GE or GELI may follow options of their head (`GELI --heads 5`).
        algorithms: of `--algo`, or best-of-N. Options of train_rl_GELI.py may follow (`ppo --lam 1`; behind best-of-N
            only `--ensemble`), and `ppo-published` begins from the published settings in place of `--preset small`.
        steps: of training. save_steps: steps between two checkpoints, each of which is measured.
        prompts: held-out prompts; of best-of-N half of them.
        device: `--device`. dtype: `--dtype` of the policies.
        shared: folder of the planted corpus, the small policy and the heads, if another one than `out`.
    """

    out: Path
    data_dir: str
    encoder: str
    policy: str = SMALL
    prompt_format: str = "chat"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    rewards: tuple[str, ...] = ("GELI", "GE", "LI", "truth", "random")
    algorithms: tuple[str, ...] = ("ppo", "distill", "best-of-64")
    steps: int = 50
    save_steps: int = 5
    prompts: int = 256
    device: str = "cpu"
    dtype: str = "auto"
    shared: Path | None = None

    @property
    def parts(self) -> Path:
        """Folder of the planted corpus, the small policy and the heads."""
        return self.shared or self.out
