"""The pages say what the code does: their examples run, their links lead somewhere, their tables are up to date."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment_of_its_own
from options_table import PAGE, options_page

FOLDER_PAGES = [ROOT / "candor/README.md", ROOT / "rlmf_weights/README.md"]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("apps/*/README.md")), *FOLDER_PAGES]
APPS = {path.parent.name for path in ROOT.glob("tests/apps/*/test_*.py")}
OUTSIDE = {".git", ".venv", ".venv-trl", "wandb", ".ruff_cache", ".pytest_cache", ".hypothesis"}
BLOCK = re.compile(r"^```python\n# (\S+), below (\w+)\n.*?^```$", re.MULTILINE | re.DOTALL)


def belongs_to_a_deleted_app(path: Path) -> bool:
    """Whether a path lies in an app's folder that is not there: an app may be deleted, and pages still name it."""
    parts = Path(os.path.normpath(path)).relative_to(ROOT).parts
    app = Path(parts[1]).stem if parts[0] == "apps" and len(parts) > 1 else ""
    return app in APPS and not (ROOT / "apps" / app).is_dir()


def sources() -> list[Path]:
    """The text files of the repository."""
    endings = (".py", ".md", ".sh", ".toml", ".yaml", ".txt")
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in OUTSIDE]
        found += [Path(folder, name) for name in files if name.endswith(endings)]
    return found


def test_options_page_is_up_to_date():
    assert PAGE.read_text() == options_page(), "run python tests/support/options_table.py"


def test_nothing_refers_to_documents_that_are_not_in_the_repository():
    names = [f"{word}.md" for word in ("DESIGN", "HOUSE", "STYLE")]  # assembled, so that this file has none of them
    assert len(sources()) > 60
    assert not [(path, name) for path in sources() for name in names if name in path.read_text(errors="replace")]


def test_git_ignores_what_documented_commands_write():
    """Conversations, and what quotes them, in the folders that the pages name."""
    names = "talks casino planted sample sample_models candor_of_ours shares study cache wandb".split()
    paths = [f"{name}/x" for name in names] + ["candor/x", "rlmf_weights/GELI_llama_responses.csv", "talk-1.json"]
    paths += ["turn_rewards.parquet", "scored.csv", "scored.csv.parts/0.csv", "rater_1_filled.csv", "chats.jsonl"]
    asked = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True)
    if asked.returncode == 128:
        pytest.skip("this is no checkout")
    assert asked.stdout.split() == paths


def test_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 10_240


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        linked = page.parent / path if path else page
        if belongs_to_a_deleted_app(linked):
            continue
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_pages_name_exist(page):
    text = page.read_text()
    tests = set(re.findall(r"\b(test_\w+|fuzz_reader|fault_server)\.py", text))
    assert tests <= {path.stem for path in (ROOT / "tests").rglob("*.py")}
    rooms = "tools|benchmarks|tests|geli|apps|experiments|accelerate_configs"
    names = [ROOT / name for name in re.findall(rf"\b((?:{rooms})/[\w/]+\.(?:py|yaml|sh|txt))\b", text)]
    assert not [name for name in names if not name.is_file() and not belongs_to_a_deleted_app(name)]


def test_commands_that_are_named_anywhere_exist():
    """In pages, docstrings and messages: `python FILE` and `python -m apps.NAME`."""
    found = {}
    for path in sources():
        text = path.read_text(errors="replace")
        for name in re.findall(r"\bpython3? ((?:tools|experiments|benchmarks|tests|apps)/[\w/]+\.py)\b", text):
            found[ROOT / name] = path
        for name in re.findall(r"-m (apps\.[a-z_]+(?:\.\w+)*)", text):
            module = ROOT / name.replace(".", "/")
            found[module / "__main__.py" if module.is_dir() else module.with_suffix(".py")] = path
    assert len(found) > 15
    missing = {str(name): str(path) for name, path in found.items() if not name.is_file()}
    assert not {name: path for name, path in missing.items() if not belongs_to_a_deleted_app(Path(name))}


def test_pages_use_options_that_exist():
    if any(not (ROOT / "apps" / name).is_dir() for name in APPS):
        pytest.skip("an app is not there, and so its options are unknown")
    known = {*re.findall(r"`(--\w+)`", options_page())}
    for room in ("tools", "experiments", "apps", "benchmarks"):
        for script in (ROOT / room).rglob("*.py"):
            known |= {*re.findall(r'"(--\w+)"', script.read_text())}
    known |= {"--help", "--wide", "--config_file", "--standalone", "--nproc_per_node"}  # argparse, extending.md, torch
    known |= {"--no", "--remote_rm_url"}  # pip's --no-deps, OpenRLHF
    known |= {"--machine_rank", "--main_process_ip", "--head", "--port", "--address", "--num"}  # accelerate, Ray
    known |= {"--nnodes", "--node_rank", "--master_addr", "--master_port", "--cpu"}  # torch, accelerate
    known |= {"--tensor_parallel_size"}  # trl vllm-serve
    for page in PAGES:
        found = set(re.findall(r"(?<![\w-])(--[a-zA-Z]\w*)", page.read_text()))
        if page.name not in ("hostile_inputs.md", "hostile_data.md"):
            assert found <= known, f"{page.name}: {sorted(found - known)}"


# ---------------------------------------------------------------------------------------------------------------------
# The examples of docs/extending.md, pasted into a copy of the repository

DRIVER = """
import importlib, io, json, sys
from pathlib import Path
sys.path[:0] = ["", "tools", "tests/support"]
from accelerate.state import AcceleratorState
from tools.converters import convert
from tools.sample_candor import write_corpus
convert("chats", Path("."), Path("converted"))
write_corpus(Path("corpus"), conversations=8, n_turns=12, seed=0)
from options_table import options_page
Path("options.md").write_text(options_page())
from experiments import compare
Path("compare.json").write_text(json.dumps([row for row, *_ in compare.commands("encoder")]))
for script, *arguments in json.loads(sys.argv[1]):
    AcceleratorState._reset_state(reset_partial_state=True)
    module = importlib.import_module(script)
    sys.stdin = io.StringIO("yes\\nHello there!\\n/rate\\n4\\n/quit\\n")  # for the chat
    module.main(module.parse_options(arguments))
from data_utils import read_corpus
for talk in read_corpus("talks", "partner_listened").trajectories.values() if Path("talks").is_dir() else ():
    print("The talk's score:", *(trajectory.score for trajectory in talk))
for code in json.loads(sys.argv[2]):
    exec(code, {})
"""
# what stands in the README's examples -> what the commands of this test write
TRAINED = {
    'load("geli")': 'load("out/visual_feedback_baselines_bart_partner_listened_baseline_HUBER_K_160/reward1_geli")',
}


def paste(repository, block: re.Match) -> None:
    """Puts a block below the table that it names."""
    file = repository / block[1]
    lines = file.read_text().splitlines(keepends=True)
    places = [
        node.end_lineno
        for node in ast.parse("".join(lines)).body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [block[2]]
    ]
    assert len(places) == 1, f"{block[1]} has no table {block[2]}"
    code = block[0].removeprefix("```python\n").removesuffix("```")
    lines.insert(places[0], f"\n\n{code}\n\n")
    file.write_text("".join(lines))


def hub_copy(folder, hub_id: str, model) -> None:
    """A model as the hub's cache holds it, so that an alias can be loaded without a network."""
    revision, repository = "0" * 40, folder / "hub" / f"models--{hub_id.replace('/', '--')}"
    shutil.copytree(model, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)


@pytest.fixture(scope="module")
def extended(tmp_path_factory, tiny):
    """A copy of the repository with every example pasted into it, after the commands that use them."""
    folder = tmp_path_factory.mktemp("extended") / "geli"
    for name in ("geli", "apps", "experiments", "tools", "tests/support"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for block in BLOCK.finditer((ROOT / "docs/extending.md").read_text()):
        paste(folder, block)
    hub_copy(folder / "hf", "facebook/bart-base", tiny / "bart")
    hub_copy(folder / "hf", "EleutherAI/pythia-160m", tiny / "llama")
    chat = {"messages": [["a", "Hello there, how are you today?"], ["b", "Fine."]], "ratings": {"a": 7, "b": 3}}
    (folder / "chats.jsonl").write_text(f"{json.dumps(chat)}\n{json.dumps(chat)}\n")
    common = "--output_dir out --context_turns 2 --device cpu".split()
    data = "--data_dir corpus --reward_class partner_listened --no_cache".split()
    reward = "--model bart --wide --epochs 1 --batch_size 16 --val --train".split()
    commands = [
        ["train_reward_LI_only", *data, *reward, *"--train_size 4 --li_signal reply --run_name li".split()],
        ["train_reward_GELI", *data, *reward, *"--redist_type HUBER --affect_path li --run_name geli".split()],
        ["train_rl_GELI", *data, *"--train --val --model_name pythia --algo reinforce --rf_model HUBER".split(),
         *"--steps 2 --batch_size 2 --val_prompts 2".split()],
    ]  # fmt: skip
    if (ROOT / "apps/chat").is_dir():
        commands.append(["apps.chat.__main__", *"--weights out/rlmf_weights/GELI_pythia_2 --collect talks".split()])
    examples = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) == 1
    for written, trained in TRAINED.items():
        assert sum(written in example for example in examples) == 1
        examples = [example.replace(written, trained) for example in examples]
    environment = environment_of_its_own(HF_HOME=str(folder / "hf"), WANDB_MODE="disabled", OMP_NUM_THREADS="1")
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([[*command, *common] for command in commands]), json.dumps(examples)],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout


def test_every_code_block_is_an_example_of_a_table():
    page = (ROOT / "docs/extending.md").read_text()
    tables = [(block[1], block[2]) for block in BLOCK.finditer(page)]
    assert len(tables) == page.count("```python") == len(set(tables)) == 9
    assert max(block[0].count("\n") for block in BLOCK.finditer(page)) < 25


def test_examples_train_through_the_three_commands(extended):
    folder, printed = extended
    li = next(folder.glob("out/SINGLE_INDEX_reward_function_bart_*/reward1_li.json"))
    assert json.loads(li.read_text())["arguments"]["li_signal"] == "reply"
    geli = folder / "out/visual_feedback_baselines_bart_partner_listened_baseline_HUBER_K_160"
    record = json.loads((geli / "reward1_geli.json").read_text())
    assert record["arguments"]["li_signal"] == "reply"  # follows stage 1's head
    assert "Stage 2 (GELI, HUBER)" in printed
    assert "HUBER, LI from the reply" in printed
    assert (folder / "out/rlmf_weights/GELI_pythia_2/adapter_model.safetensors").is_file()
    assert "Stage 3 (REINFORCE)" in printed


@pytest.mark.skipif(not (ROOT / "apps/chat").is_dir(), reason="there is no apps/chat")
def test_the_chat_asks_the_question_of_the_example(extended):
    _, printed = extended
    assert "How well did your partner listen? (1: not at all … 5: very well)" in printed
    assert "Noted: partner_listened 4." in printed and "The talk's score: 80.0\n" in printed


def test_examples_pass_the_linter(extended):
    command = [sys.executable, "-m", "ruff", "check", "--config", ROOT / "pyproject.toml", "."]
    subprocess.run(command, cwd=extended[0], check=True)


def test_readmes_examples_use_what_was_trained(extended):
    assert re.search(r"^\[-?[01]\.\d+\]$", extended[1], re.MULTILINE)  # the reward that the first one prints


def test_parsers_help_and_compare_read_the_examples(extended):
    folder, _ = extended
    page = (folder / "options.md").read_text()
    for said in (
        "HUBER: as RRD",
        "reply: the length",
        "`--wide`",
        "LLAMA2, bart",
        "smollm2, pythia",
        "REINFORCE, a",
        "you_are_warm, partner_listened;",
    ):
        assert said in page
    rows = json.loads((folder / "compare.json").read_text())
    assert {"LI:reply", "GE:HUBER", "GELI:HUBER×reply", "GELI:RRD×reply"} <= set(rows)


def test_converted_example_is_in_candors_layout(extended):
    folder, _ = extended
    assert sorted(path.name for path in (folder / "converted").iterdir()) == ["chat-00000", "chat-00001"]
    assert (folder / "converted/chat-00001/transcription/transcript_cliffhanger.csv").read_text().count("\n") == 3
