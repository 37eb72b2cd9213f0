"""Imports point down, and stand at the top of a file. (`lint-imports` checks the order inside geli/.)"""

import ast

import pytest
from conftest import ROOT

ORDER = ["data_utils", "models", "train_reward_LI_only train_reward_GELI train_rl_GELI"]  # each imports those before it
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names.split()}
SOURCES = sorted(
    path for folder in ("", "geli", "tools") for path in (ROOT / folder).glob("**/*.py" if folder == "geli" else "*.py")
)
# own modules that are imported inside a function, and why
EXCEPTIONS = {
    ("data_utils.py", "geli.nets.sentiment"),  # imports transformers, which takes seconds, and is rarely used
    ("geli/__init__.py", "geli.reward"),  # `import geli` alone is to load nothing
}


def imports_of(node: ast.AST) -> list[str]:
    """The modules that are imported anywhere below a node of a syntax tree."""
    found = []
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found += [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            found.append(child.module)
    return found


def test_there_are_sources_to_check():
    names = {str(path.relative_to(ROOT)) for path in SOURCES}
    assert {"models.py", "data_utils.py", "geli/run/options.py", "tools/sample_candor.py", "train_rl_GELI.py"} <= names


@pytest.mark.parametrize("name", LEVEL)
def test_root_modules_import_only_those_below_them(name):
    for imported in imports_of(ast.parse((ROOT / f"{name}.py").read_text())):
        assert LEVEL.get(imported.split(".")[0], -1) < LEVEL[name]


def test_no_own_module_is_imported_inside_a_function_but_for_the_exceptions():
    own = {"geli", *LEVEL, *(path.stem for path in SOURCES if path.parent.name == "tools")}
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found |= {(str(path.relative_to(ROOT)), name) for name in imports_of(node) if name.split(".")[0] in own}
    assert found == EXCEPTIONS


@pytest.mark.parametrize("name", LEVEL)
def test_functions_of_the_root_modules_fit_a_screen(name):
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{name}.{node.name} has more than 60 lines"
