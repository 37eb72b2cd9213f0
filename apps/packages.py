"""Packages that only some apps need: each is in its app's requirements.txt."""

import importlib
from types import ModuleType

from geli.run.errors import UserError


def install(app: str) -> str:
    """The command that installs what an app needs, from the repository's folder."""
    return f"pip install -r apps/{app}/requirements.txt"


def require(module: str, purpose: str, install: str) -> ModuleType:
    """Imports a module of an optional package, or one of an app that needs such a package.

    Args:
        module: its name. purpose: what it is for, the beginning of the error. install: the command that installs it.

    Raises:
        UserError: if the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{purpose} needs a Python package that is missing ({error}): {install}") from None
