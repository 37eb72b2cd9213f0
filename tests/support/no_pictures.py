"""One white pixel in place of every picture, in tests that look at none of them; commands that are quick."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import train_rl_GELI
from geli.report import plots
from geli.run.files import atomic_path

PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg==")


def without_pictures(patch) -> None:
    """Makes figures cost nothing. `patch`: a pytest MonkeyPatch."""
    for name in ("turn_rewards", "returns", "affects", "learning", "ppo", "before_after"):
        patch.setattr(plots, name, lambda *arguments: [save_pixel(None, arguments[-1])])


def save_pixel(figure, path: Path) -> Path:
    """In place of `plots.save`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(PIXEL)
    return path


@contextmanager
def quick_commands(**lengths: int) -> Iterator[None]:
    """Without wandb and pictures, and with responses of these `min_new_tokens` and `max_new_tokens`."""
    parse = train_rl_GELI.parse_options

    def parse_short(argv=None):
        options = parse(argv)
        return replace(options, ppo=replace(options.ppo, **lengths))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        patch.setattr(train_rl_GELI, "parse_options", parse_short)
        without_pictures(patch)
        yield
