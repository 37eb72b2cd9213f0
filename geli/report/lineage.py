"""The runs that a run started from: a policy's reward run, and that one's stage-1 run."""

import os
from pathlib import Path
from typing import NamedTuple

from geli.run.files import read_json_or_empty
from geli.run.run_names import record_path, report_path


class Ancestor(NamedTuple):
    """A finished run of stage 1 or 2.

    Attributes:
        run: its name. stage: 1 or 2. report: its page, None if there is none. wandb: project and id of its wandb run.
    """

    run: str
    stage: int
    report: Path | None
    wandb: dict

    @property
    def label(self) -> str:
        """One line for a reader."""
        return f"stage {self.stage}: run {self.run}"


def lineage(head: Path | None) -> list[Ancestor]:
    """The run that made a head, and the runs that it started from, nearest first. Published heads have no record."""
    found: list[Ancestor] = []
    while head and len(found) < 3:  # there are two stages; more would be a circle
        run = head.name.removeprefix("reward1_")
        record = read_json_or_empty(record_path(head.parent, run))
        if not record:
            break
        page = report_path(head.parent, run)
        found.append(Ancestor(run, record.get("stage", 0), page if page.is_file() else None, record.get("wandb", {})))
        head = record.get("started_from") and Path(os.path.normpath(head.parent / record["started_from"]))
    return found


def lineage_config(head: Path | None) -> dict[str, str]:
    """The same for wandb's config: stage -> run, and the project and id of its wandb run."""
    config = {}
    for ancestor in lineage(head):
        config[f"stage_{ancestor.stage}_run"] = ancestor.run
        config |= {f"stage_{ancestor.stage}_wandb_{key}": value for key, value in ancestor.wandb.items()}
    return config
