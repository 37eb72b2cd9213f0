"""The files that stage 3 writes: names, metrics, checkpoints, and moving the files of an earlier run aside."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from geli.nets.policy import Policy
from geli.nets.pretrained import recorded_base
from geli.rl.diagnose import diagnose
from geli.rl.evaluation import efficiency
from geli.run.console import progress_bar
from geli.run.errors import UserError
from geli.run.files import atomic_path, read_json_or_empty, write_json
from geli.run.lock import RunLock
from geli.run.tracking import Tracker

_PICTURES = r"_report\.html|(_ppo|_before_after)\.(png|pdf)"
ON_CARD = ("score_mean", "human_score_mean", "kl", "response_length_mean", "distinct_2")  # of a step
_OUTPUTS = rf"(_sft|_\d+|(_\d+_val|_base)?(\.json|_responses\.csv|{_PICTURES})|_steps\.csv)"


class OutputNames(NamedTuple):
    """Where stage 3 writes: in `folder`, under names that begin with `stem`; the SFT warm start to `sft_model`."""

    folder: Path
    stem: str
    sft_model: Path

    @classmethod
    def of(cls, output_dir: str, exp_name: str, model_name: str, ppo_off: bool) -> "OutputNames":
        """The names that these options ask for."""
        folder, stem = Path(output_dir) / "rlmf_weights", f"{exp_name}_{Path(model_name).name}"
        return cls(folder, stem + "_ppo_off" * ppo_off, folder / f"{stem}_sft")

    def report_stem(self, checkpoint: Path | None, base: bool) -> str:
        """How the names of the report begin: those of a mere evaluation, of a checkpoint or of the reference policy
        (`base`), leave those of training alone."""
        if checkpoint:
            return f"{checkpoint.name}_val"
        return f"{self.stem}_base" if base else self.stem


def outputs_of(stem: str) -> re.Pattern:
    """A pattern of the names of the files and folders that the run `stem` writes."""
    return re.compile(re.escape(stem) + _OUTPUTS)


def lock_outputs(folder: Path, stem: str, lock: RunLock | None = None) -> RunLock:
    """Locks the output names of a new run, and moves an earlier run's outputs of these names, and its checkpoints if it
    is unfinished, to `{stem}.earlier-{k}/`. Adapters that were trained on its SFT model then name its new place.

    Args:
        lock: the lock, if the process holds it already, because it was to resume a run that has no checkpoint.
    """
    lock = lock or RunLock(folder, stem, outputs_of(stem), resume=True)  # an unfinished run's folder may exist
    outputs = sorted(path for path in folder.glob("*") if outputs_of(stem).fullmatch(path.name))
    unfinished = lock.unfinished()
    if not outputs and not unfinished:
        return lock
    k = 1
    while (aside := folder / f"{stem}.earlier-{k}").exists():
        k += 1
    sft_name = f"{stem}_sft"
    for path in [*outputs, *unfinished]:
        place = aside / lock.folder.name if path in unfinished else aside
        place.mkdir(parents=True, exist_ok=True)
        config = path / "adapter_config.json"
        if config.is_file() and Path(recorded_base(path, "--train")).name == sft_name:
            moved = {"base_model_name_or_path": str((aside / sft_name).resolve())}
            write_json(config, read_json_or_empty(config) | moved)
        path.rename(place / path.name)
    lock.description = {}
    what = f"{len(outputs)} outputs of these names" + (" and its checkpoints (it is unfinished)" if unfinished else "")
    print(f"An earlier run's {what} are now in {aside}")
    return lock


def base_of(checkpoint: Path, sft_model: Path) -> str | None:
    """The folder `sft_model` if the checkpoint's adapter was trained on a model of its name, else None. Raises a
    `UserError` if that model is missing."""
    if Path(recorded_base(checkpoint, "--val")).name != sft_model.name:
        return None
    if not sft_model.is_dir():
        raise UserError(f"{checkpoint} was trained on {sft_model}, which is not there: put it back, or train again")
    return str(sft_model.resolve())


def newest_checkpoint(folder: Path, stem: str) -> Path:
    """The checkpoint of the run `stem` after the most steps."""
    steps = [p.name.removeprefix(f"{stem}_") for p in folder.glob("*") if p.name.startswith(f"{stem}_")]
    steps = [int(step) for step in steps if step.isascii() and step.isdecimal()]
    if not steps:
        raise UserError(
            f"--val or --generate without --train: expected a checkpoint {folder}/{stem}_STEP, found none: add "
            "--train, or give --rf_model base for the reference policy alone"
        )
    return folder / f"{stem}_{max(steps)}"


class Recorder:
    """Records a training run: metrics, the policy at intervals, and warnings.

    Args:
        policy: the policy that is saved. folder, stem: where the files go, and how their names begin.
        steps: of the run. algo: its name, for the progress bar.
        save_every: steps between two saved policies. target_kl_response: in nats a response, see `diagnose`.
        saves: False saves no policy, for a run that does not change it.
        card: (name of a folder, what was measured) -> the README of the policy in it.
    """

    def __init__(
        self, policy: Policy, tracker: Tracker, folder: Path, stem: str, *, steps: int, algo: str,
        save_every: int, target_kl_response: float, saves: bool = True, card: Callable[[str, dict], str],
    ):  # fmt: skip
        self.policy, self.tracker, self.folder, self.stem = policy, tracker, folder, stem
        self.steps, self.save_every, self.target_kl_response, self.saves = steps, save_every, target_kl_response, saves
        self.card = card
        self.rows: list[dict] = []
        self.checkpoint: Path | None = None
        self.problems: dict[str, str] = {}  # check of `diagnose` -> what it said first
        self._bar = progress_bar(total=steps, desc=f"stage 3 ({algo.upper()})", unit="step")

    def state_dict(self) -> dict:
        """The metrics so far, the problems found, and the last checkpoint."""
        checkpoint = str(self.checkpoint) if self.checkpoint else None
        return {"rows": self.rows, "problems": self.problems, "checkpoint": checkpoint}

    def load_state_dict(self, state: dict) -> None:
        """Restores the recorder."""
        self.rows, self.problems = state["rows"], state["problems"]
        self.checkpoint = Path(state["checkpoint"]) if state["checkpoint"] else None
        self._bar.update(len(self.rows))

    def step(self, step: int, metrics: dict[str, float], last: bool = False) -> None:
        """Records the metrics of a step, the `last` of the run or not. Raises a `UserError` if one is not finite."""
        metrics = metrics | self._efficiencies(metrics)
        self.rows.append({"step": step, **metrics})
        self._bar.update()
        self._bar.set_postfix(reward=f"{metrics['score_mean']:.3f}", kl=f"{metrics.get('kl', 0):.2f}", refresh=False)
        bad = ", ".join(name for name, value in metrics.items() if not np.isfinite(value))
        if bad:
            raise UserError(
                f"not finite at step {step}: {bad}; try a lower --learning_rate (last checkpoint: {self.checkpoint})"
            )
        self.tracker.log({f"ppo/{name}": value for name, value in metrics.items()}, step)
        for check, problem in diagnose(self.rows, self.target_kl_response).items():
            if check not in self.problems:  # once a run
                self.problems[check] = f"step {step}: {problem}"
                self._bar.write(f"Step {step}: {problem}.")
        if step % self.save_every == 0 or step == self.steps or last:
            self._save(step)

    def _efficiencies(self, metrics: dict[str, float]) -> dict[str, float]:
        """The efficiency of a step (see `geli.rl.evaluation.efficiency`) in reward, and in the gold reward where it is
        measured. The first step's responses are the reference's."""
        first, found = self.rows[0] if self.rows else metrics, {}
        for name, key in {"score": "efficiency", "gold": "gold_efficiency"}.items():
            if f"{name}_mean" in metrics and f"{name}_std" in first:
                gain = metrics[f"{name}_mean"] - first[f"{name}_mean"]
                found[key] = efficiency(gain, first[f"{name}_std"], metrics.get("kl", 0.0))
        return {key: value for key, value in found.items() if value is not None}

    def _save(self, step: int) -> None:
        if self.saves:
            self.checkpoint = self.folder / f"{self.stem}_{step}"
            last = {
                f"{name}, step {step} of training": self.rows[-1][name] for name in ON_CARD if name in self.rows[-1]
            }
            self.policy.save(self.checkpoint, self.card(self.checkpoint.name, last))
        with atomic_path(self.folder / f"{self.stem}_steps.csv") as temporary:
            pd.DataFrame(self.rows).to_csv(temporary, index=False, float_format="%.6g")

    def finish(self) -> list[Path]:
        """Closes the progress bar; returns the paths of what the run wrote."""
        self._bar.close()
        return [*([self.checkpoint] if self.checkpoint else []), self.folder / f"{self.stem}_steps.csv"]
