"""Small inputs from real situations, which are kept beside the checkout."""

from pathlib import Path

import pytest

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"


def case(name: str) -> Path:
    """The path of an input; skips the test where there is none."""
    if not (CASES / name).exists():
        pytest.skip(f"{CASES / name} is not here")
    return CASES / name
