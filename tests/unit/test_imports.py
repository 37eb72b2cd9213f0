"""Imports point down and stand at the top of a file; the paper's part stays small. (`lint-imports` checks the order
inside the packages.)"""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

PAPER = {"models", "data_utils", "geli"}
ROOMS = {  # room -> the other rooms that it may import; benchmarks/ and tests/ may import everything
    "geli": {"models", "data_utils"},  # its lower rooms neither: see lint-imports
    "data_utils": {"geli"},
    "models": {"data_utils", "geli"},
    "train_reward_LI_only": PAPER,
    "train_reward_GELI": PAPER,
    "train_rl_GELI": PAPER,
    "tools": PAPER,
    "apps": PAPER,
    "experiments": PAPER | {"tools"},
}
OWN = {*ROOMS, "benchmarks"}
SOURCES = [
    *sorted(ROOT.glob("*.py")),
    *(path for room in ("geli", "tools", "apps", "experiments") for path in sorted((ROOT / room).rglob("*.py"))),
]
# own modules that are imported inside a function, and why
EXCEPTIONS = {
    ("data_utils.py", "geli.nets.sentiment"),  # imports transformers, which takes seconds, and is rarely used
    ("geli/__init__.py", "geli.reward"),  # `import geli` alone is to load nothing
}


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(node: ast.AST) -> list[str]:
    """The modules of this repository that are imported anywhere below a node of a syntax tree."""
    found = []
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found += [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):  # `from apps import chat` imports apps.chat
            found += [child.module, *(f"{child.module}.{alias.name}" for alias in child.names)]
    return [name for name in found if name.split(".")[0] in OWN]


def functions(path: Path) -> list[ast.AST]:
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_there_are_sources_to_check():
    assert {"models.py", "data_utils.py", "geli/run/options.py", "tools/sample_candor.py"} <= {*map(shown, SOURCES)}
    assert {*ROOMS} == {*map(room_of, SOURCES)}


def test_a_module_imports_only_the_rooms_below_its_own():
    for path in SOURCES:
        allowed = ROOMS[room_of(path)] | ({room_of(path)} if path.parent != ROOT else set())
        found = {name.split(".")[0] for name in imports_of(ast.parse(path.read_text()))}
        assert found <= allowed, f"{shown(path)} imports {sorted(found - allowed)}"


def test_an_app_knows_no_other_app_and_what_they_share_knows_none():
    apps = {path.name for path in (ROOT / "apps").iterdir() if (path / "__init__.py").is_file()}
    for path in (ROOT / "apps").rglob("*.py"):
        names = [name.split(".") for name in imports_of(ast.parse(path.read_text()))]
        known = {name[1] for name in names if name[0] == "apps" and len(name) > 1} & apps
        assert known <= {path.parent.name}, f"{shown(path)} imports {sorted(known)}"


def test_no_own_module_is_imported_inside_a_function_but_for_the_exceptions():
    inside = {(shown(path), name) for path in SOURCES for node in functions(path) for name in imports_of(node)}
    modules = {shown(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in SOURCES}
    assert {(path, name) for path, name in inside if name in modules} == EXCEPTIONS


@pytest.mark.parametrize("path", ROOT.glob("*.py"), ids=shown)
def test_functions_of_the_root_modules_fit_a_screen(path):
    for node in functions(path):
        assert node.end_lineno - node.lineno < 60, f"{path.stem}.{node.name} has more than 60 lines"


def test_every_main_fits_a_screen():
    mains = {shown(path): node for path in SOURCES for node in functions(path) if node.name == "main"}
    assert len(mains) > 15
    assert not [name for name, main in mains.items() if main.end_lineno - main.lineno >= 60]


def test_models_opens_no_file():
    opens = r"\bopen\(|\.(read|write)_(text|bytes)\(|\bsafetensors\b|\btorch\.(save|load)\(|save_file\(|load_file\("
    assert not re.findall(opens, (ROOT / "models.py").read_text())


def test_what_the_stages_share_is_small():
    paper = [path for path in SOURCES if path.parent == ROOT or room_of(path) == "geli"]
    assert sum(path.read_text().count("\n") for path in paper) <= 12_075


def test_the_root_has_few_entries():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    entries = {name.split("/")[0] for name in files.splitlines()}
    assert len([name for name in entries if not name.startswith(".")]) <= 21
