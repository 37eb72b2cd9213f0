"""Which reward stage 3 uses: the options that say so, and the one choice that they come to."""

from dataclasses import dataclass
from typing import NamedTuple

from geli.run.options import option, positive_float, positive_int


class HeadKind(NamedTuple):
    """A choice of `--rf_model`, which takes the newest of some reward heads.

    Attributes:
        folders: patterns of the folders that they are in. command: how to train one.
        li_signal: the LI signal that they must have learned from; None: any. reward_class: the question that they are
        for; None: that of `--reward_class`.
    """

    folders: tuple[str, ...]
    command: str
    li_signal: str | None = None
    reward_class: str | None = None


_STAGE_2 = "train_reward_GELI.py --train --affect_path RUN"
_SHORT_CLASSES = {
    "funny": "you_are_funny",
    "intelligent": "you_are_intelligent",
    "humble": "you_are_humble",
    "sync": "our_thoughts_synced_up_sr1",
}
RF_MODELS = {
    "GELI": HeadKind(("visual_feedback_baselines_*",), _STAGE_2),
    "GE": HeadKind(("baselines_*",), "train_reward_GELI.py --train"),
    "LI": HeadKind(("*reward_function_*",), "train_reward_LI_only.py"),
    "sentiment": HeadKind(
        ("*reward_function_*", "visual_feedback_baselines_*"),
        "train_reward_LI_only.py --li_signal sentiment",
        li_signal="sentiment",
    ),
    **{
        f"VFRRD_{short}": HeadKind(
            (f"visual_feedback_baselines_*_{name}_baseline_*",), f"{_STAGE_2} --reward_class {name}", reward_class=name
        )
        for short, name in _SHORT_CLASSES.items()
    },
}
ENSEMBLES = {  # how several heads in one file score
    "mean": "the mean of their rewards",
    "lower": "the mean less --spread_penalty times the standard deviation",
    "weights": "one head, of the mean of their weights",
}
BASE = "base"  # the choice without RL: the reference policy, measured with GELI's reward


class Reward(NamedTuple):
    """What scores responses.

    Attributes:
        kind: newest: the newest head of a kind; head: one head; function: a function; random: random numbers.
        name: a key of `RF_MODELS`, a head's run or path, MODULE:FUNCTION, or `random`.
    """

    kind: str
    name: str

    @property
    def is_head(self) -> bool:
        """Whether it is a reward head's."""
        return self.kind in ("newest", "head")


@dataclass(frozen=True)
class RewardOptions:
    """What responses are scored by."""

    reward: str = option(
        "redistributed_reward",
        "the turn reward of --rf_model, or a random number (a control: nothing should be learned)",
        choices=("redistributed_reward", "random"),
    )
    rf_model: str = option(
        "GELI",
        "of which kind the newest reward head under --output_dir for this corpus and question is used; base: no RL, "
        "the reference policy",
        choices=(*RF_MODELS, BASE),
    )
    reward_path: str | None = option(
        None, "one reward head instead: a run name or the path of a reward1_ file", metavar="HEAD"
    )
    reward_function: str | None = option(
        None,
        "a Python function instead of a head: (prompts, responses) -> a number for each",
        metavar="MODULE:FUNCTION",
    )
    gold_function: str | None = option(
        None,
        "such a function that is never trained on, but measured on held-out prompts and (ppo) at every step, to see "
        "over-optimization of the reward",
        metavar="MODULE:FUNCTION",
    )
    ensemble: str = option(
        "mean",
        f"what the reward of --heads is. {'; '.join(f'{name}: {help}' for name, help in ENSEMBLES.items())}",
        choices=ENSEMBLES,
    )
    spread_penalty: float = option(1.0, "of --ensemble lower", type=positive_float)
    lang_model_path: str | None = option(
        None, "encoder of a published head, which records none; other heads use their own"
    )
    max_length: int = option(1024, "encoder tokens; less if the encoder's limit is lower", type=positive_int)

    @property
    def chosen(self) -> Reward:
        """The reward that the options come to, if `conflict` finds nothing."""
        if self.reward_function:
            return Reward("function", self.reward_function)
        if self.reward == "random":
            return Reward("random", "random")
        if self.reward_path:
            return Reward("head", self.reward_path)
        return Reward("newest", "GELI" if self.rf_model == BASE else self.rf_model)

    def conflict(self, given: set[str]) -> str | None:
        """Names the options that ask for different rewards. Args: given: names of the options on the command line."""
        asked = {
            f"--reward {self.reward}": self.reward == "random" or ("reward" in given and self.reward_function),
            f"--rf_model {self.rf_model}": "rf_model" in given and self.rf_model != BASE,
            "--reward_path": self.reward_path,
            "--reward_function": self.reward_function,
        }
        names = [name for name, asks in asked.items() if asks]
        return f"{' and '.join(names)} ask for different rewards: give one of them" if len(names) > 1 else None
