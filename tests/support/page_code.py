"""The Python code on a page, and running it."""

import re
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMES = {  # short name -> what stands on the pages
    "RUN": "visual_feedback_baselines_convo_overall_affect_baseline_RRD_K_160/reward1_RUN",
    "MODEL": "HuggingFaceTB/SmolLM2-135M-Instruct",
}


def blocks(page: Path) -> list[str]:
    """The code blocks of a page."""
    return BLOCK.findall(page.read_text())


def execute(code: str, **names: str) -> dict:
    """The variables of a block after it has run, with `names` in place of those on the page."""
    for written, here in names.items():
        written = NAMES.get(written, written)
        assert code.count(written) == 1
        code = code.replace(written, here)
    variables = {}
    exec(code, variables)
    return variables
