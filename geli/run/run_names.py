"""Names of runs, and of the files that a run of stage 1 or 2 writes."""

import re
import secrets
from pathlib import Path

_ADJECTIVES = (
    "amber bold brisk calm clear crisp daring dawn deep eager early fair fleet fond frosty gentle golden grand happy "
    "honest jolly keen kind light lively lucky mellow merry mild neat noble pale patient proud quiet rapid rosy sage "
    "scarlet serene silver smooth solar still sunny swift tidy vivid warm wise young"
).split()
_NOUNS = (
    "aspen bay bird breeze brook canyon cedar cliff cloud comet cove creek dawn dew dream dune ember fern field flower "
    "forest frost garden glade grove harbor hill island lake leaf meadow mist moon morning moss mountain oak ocean "
    "pebble pine plain pond prairie rain reef ridge river sea sky snow sound star stone storm stream sun surf thunder "
    "tree valley violet water wave wind wood"
).split()


def new_run_name(folder: Path) -> str:
    """A random name in wandb's style (adjective-noun-number) that no finished run in `folder` has."""
    finished = len(list(folder.glob("reward1_*.json"))) if folder.is_dir() else 0
    while True:
        name = f"{secrets.choice(_ADJECTIVES)}-{secrets.choice(_NOUNS)}-{finished + 1}"
        if not record_path(folder, name).exists():
            return name


def record_path(folder: Path, run_name: str) -> Path:
    """The JSON file that a run of stage 1 or 2 writes last, so that it exists only for finished runs."""
    return folder / f"reward1_{run_name}.json"


def report_path(folder: Path, run_name: str) -> Path:
    """The page that reports a run."""
    return folder / f"report_{run_name}.html"


def reward_outputs(run_name: str) -> re.Pattern:
    """Matches the names of the files and folders that a run of stage 1 or 2 writes."""
    kinds = "reward1|lang_model|val_turn_rewards|val_returns|val_affects|learning|report"
    return re.compile(rf"({kinds})_{re.escape(run_name)}(\.json|\.csv|\.png|\.pdf|\.html)?")
