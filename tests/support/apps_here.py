"""Which apps can be tested: those whose folder is there and whose requirements are installed."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "apps"
IMPORTED_AS = {"opencv-python-headless": "cv2"}  # packages whose module is not called as they are


def requirements(file: Path) -> Iterator[str]:
    """The packages that a requirements file names, those of the files that it includes among them."""
    for line in file.read_text().splitlines() if file.is_file() else ():
        if line.startswith("-r "):
            yield from requirements(file.parent / line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            yield line.split("==")[0]


def reason_to_leave_out(tests: Path) -> str | None:
    """Why the tests in a folder of tests/apps cannot run; None if they can."""
    app = ROOT / "apps" / tests.name
    if not app.is_dir():
        return f"there is no apps/{app.name}"
    modules = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in requirements(app / "requirements.txt")}
    missing = sorted(module for module in modules if find_spec(module) is None)
    return f"needs {', '.join(missing)}: pip install -r apps/{app.name}/requirements.txt" if missing else None


def left_out() -> dict[Path, str]:
    """Folder of an app's tests -> why they cannot run."""
    folders = {path.parent for path in TESTS.glob("*/test_*.py")}
    return {folder: reason for folder in sorted(folders) if (reason := reason_to_leave_out(folder))}
