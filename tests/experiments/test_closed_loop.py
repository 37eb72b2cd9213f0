"""The closed loop on a small corpus with small models: it runs, resumes, and its intervals are right."""

import csv
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import call_script
from small_models import chat_model

import train_reward_GELI
import train_rl_GELI
from experiments import closed_loop as command
from experiments import loop as closed_loop
from experiments.best_of import best_of, expected_best, kl_of_best
from experiments.loop import PolicyRun
from experiments.loop_options import LoopOptions
from experiments.loop_report import best_of_gain, best_of_rows, gain_of, means, phrases, rows
from geli.run.errors import UserError
from tools.hidden_reward import hidden_reward


@pytest.fixture(scope="module")
def looped(sample, tiny, tmp_path_factory):
    """The folder of a closed loop with one seed, and what it printed."""
    folder = tmp_path_factory.mktemp("loop")
    chat_model(tiny / "llama", folder / "llama")
    arguments = ["experiments/closed_loop.py", folder / "out", "--data_dir", sample, "--encoder", tiny / "bart"]
    arguments += ["--policy", folder / "llama", "--seeds", 0, "--steps", 2, "--save_steps", 1, "--prompts", 6]
    everything = ["--rewards", "GELI", "truth", "--algorithms", "ppo", "distill", "best-of-2"]
    a_part = ["--rewards", "truth", "--algorithms", "ppo"]

    def run_here(options, script, *more):
        """Runs a command in this process, with less work."""
        lighter = {"--epochs": 1, "--train_size": 4, "--num_generations": 2}
        if script == "train_rl_GELI.py":
            more += ("--batch_size", 8)
        words = [lighter.get(before, word) for before, word in zip(("", *more), more, strict=False)]
        commands.append([script, *words])
        call_script(script, *words)

    commands = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closed_loop, "run_command", run_here)
        patch.setenv("WANDB_MODE", "disabled")
        asked = (everything, a_part, everything)
        printed = [call_script("experiments/closed_loop.py", *arguments[1:], *part).stdout for part in asked]
        shared = ["--shared", folder / "out", "--rewards", "GELI", "--algorithms", "best-of-2"]
        call_script(arguments[0], folder / "other", *arguments[2:], *shared)
    return folder / "out", printed, commands


@pytest.mark.slow
def test_every_reward_is_in_the_table_and_nothing_is_run_twice(looped):
    out, printed, commands = looped
    assert printed[0].count("policy ") == 6 and "policy " not in printed[1] + printed[2]
    assert "GELI" in printed[1] and "best-of-2" in printed[1]  # all that the folder has is in the tables
    table = (out / "closed_loop.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in table[1:]] == [
        [r, a] for a in ("ppo", "distill", "best-of-2") for r in ("GELI", "truth")
    ]
    scripts = [script for script, *_ in commands]
    assert scripts.count("train_rl_GELI.py") == 4 and scripts.count("tools/plant_truth.py") == 1
    assert scripts.count("train_reward_GELI.py") == 1  # another folder took the corpus and the head of the first
    assert (out.parent / "other" / "results" / "GELI-best-of-2-0.json").is_file()
    assert (out / "frontier.png").stat().st_size > 5_000
    assert len((out / "later_half.csv").read_text().splitlines()) == 5  # PPO and distill by two rewards
    assert [row.split(",")[:3] for row in (out / "best_of_n.csv").read_text().splitlines()[1:]] == [
        ["GELI", "best-of-2", "2"], ["truth", "best-of-2", "2"],
    ]  # fmt: skip
    with open(out / "side_by_side.csv", newline="", encoding="utf-8") as file:
        said = list(csv.DictReader(file))
    assert list(said[0]) == ["prompt", "said", "reference"] + [
        f"{r} {a}" for a in ("ppo", "distill", "best-of-2") for r in ("GELI", "truth")
    ]


@pytest.mark.slow
def test_a_result_is_that_of_the_responses(looped):
    out, _, _ = looped
    reference = json.loads((out / "results" / "reference-0.json").read_text())
    found = json.loads((out / "results" / "truth-ppo-0.json").read_text())
    assert [point["step"] for point in found["points"]] == [1, 2]
    assert found["points"][-1]["gold"] == [hidden_reward(text) for text in found["texts"]]
    assert found["prompts"] == reference["prompts"] and len(found["texts"]) == len(reference["gold"]) == 6
    assert [row["step"] for row in found["steps"]] == [1, 2]
    first = found["steps"][0]
    assert first["gold_mean"] == pytest.approx(first["score_mean"], abs=1e-4)  # it is trained on the truth


@pytest.mark.slow
def test_the_hidden_reward_chooses_the_best_of_n(looped):
    out, _, _ = looped
    samples = [json.loads((out / "samples" / "0" / f"{k}.json").read_text())["texts"] for k in (0, 1)]
    found = json.loads((out / "results" / "truth-best-of-2-0.json").read_text())
    both = [list(map(hidden_reward, texts)) for texts in zip(*samples, strict=True)]
    assert samples[0] != samples[1] and len(both) == 3
    one, two = found["points"]
    assert (one["n"], one["gold"]) == (1, pytest.approx([sum(pair) / 2 for pair in both]))
    assert (two["n"], two["gold"]) == (2, pytest.approx([max(pair) for pair in both]))


def test_best_of_n_by_hand():
    samples = [["great", "no"], ["awful thing", "no"]]
    found = best_of(samples, lambda prompts, texts: [len(text) for text in texts], ["a", "b"])
    assert found["texts"] == ["awful thing", "no"]
    assert found["order"] == [pytest.approx(-1), None]  # the longer text is the colder; the second prompt has no order
    of_two = math.log(0.5) / 4 + 3 * math.log(1.5) / 4  # chances 1/4 and 3/4 in place of 1/2 each; 0 of the second
    assert [point["kl"] for point in found["points"]] == pytest.approx([0, of_two / 2])
    assert found["within"] == pytest.approx(4.5 / 13.5)  # rewards 5 and 11, 2 and 2


def test_the_kl_of_best_of_n_is_less_with_ties():
    rewards = np.arange(10_000.0)[:, None]
    for n in (2, 8, 64):
        assert kl_of_best(rewards, n) == pytest.approx(math.log(n) - (n - 1) / n, rel=0.01)
    # one of four has the highest reward: best-of-64 takes it surely
    assert kl_of_best(np.array([[0.0], [0], [0], [1]]), 64) == pytest.approx(math.log(4), abs=1e-6)


def test_all_samples_are_chosen_from():
    found = best_of([["a"], ["bb"], ["ccc"]], lambda prompts, texts: [len(text) for text in texts], ["p"])
    assert [point["n"] for point in found["points"]] == [1, 2, 3] and found["texts"] == ["ccc"]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_expected_best_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(5, 4)), rng.normal(size=(5, 4))
    subsets = [list(subset) for subset in itertools.combinations(range(5), n)]
    bests = [values[subset][rewards[subset].argmax(axis=0), range(4)] for subset in subsets]
    assert expected_best(rewards, values, n) == pytest.approx(np.mean(bests, axis=0))


def test_equal_rewards_choose_by_chance():
    rewards, values = np.array([[1.0], [1.0], [0.0]]), np.array([[2.0], [4.0], [9.0]])
    assert expected_best(rewards, values, 3) == pytest.approx([3.0])
    assert expected_best(np.zeros((3, 1)), values, 2) == pytest.approx([5.0])


def results(*golds, reference=(0.1, 0.2, 0.3)):
    """Results of seeds 0, 1, … with these hidden rewards, and their references."""
    shared = {"reward": "GELI", "algo": "ppo", "prompts": ["a/0/1", "a/1/2", "b/0/1"]}
    shared["texts"] = ["Nice!", "no", "so nice"]
    runs = [{**shared, "seed": i, "points": [{"kl": 1.0, "gold": list(gold)}]} for i, gold in enumerate(golds)]
    before = {"prompts": shared["prompts"], "gold": list(reference), "texts": ["no", "no", "so"]}
    return runs, dict.fromkeys(range(len(golds)), before)


def test_gains_are_paired_by_prompt():
    runs, references = results((0.2, 0.5, 0.1), (0.1, 0.2, 0.3))
    found = means(runs, [gain_of(run, run["points"], references) for run in runs])
    assert found.values == pytest.approx([0.2 / 3, 0]) and found.conversations == 2
    # a conversation drawn twice: (0.1 + 0.3) / 2, or -0.2; one each: the mean over prompts
    assert set(found.samples[0].round(6)) == {0.2, -0.2, round(0.2 / 3, 6)} and not found.samples[1].any()
    assert found.interval().value == pytest.approx(0.1 / 3) and found.interval(found) == (0, 0, 0)


def test_the_table_pairs_the_seeds_that_both_rewards_have():
    geli, references = results((0.2, 0.5, 0.1), (0.1, 0.2, 0.3))
    ge = [{**results((0.1, 0.2, 0.3))[0][0], "reward": "GE", "algo": "ppo --lam 1", "seed": 1}]
    for run in geli + ge:
        run["points"].insert(0, {"kl": 0.5, "gold": [0.1, 0.2, 0.3]})
    first, second = rows(geli + ge, references)
    assert (first["seeds"], second["seeds"], first["KL"]) == (2, 1, 1.0)
    assert first["gain"].startswith("0.033 [") and first["gain: first's less this"] is None
    assert second["gain: first's less this"].startswith("0.000 [")
    (later, _) = rows(geli + ge, references, later_half=True)
    assert (later["gain"], later["KL"]) == (first["gain"], 1.0)  # of two checkpoints
    spread = np.std((0.1, 0.2, 0.3))
    assert first["efficiency"].startswith(f"{0.1 / 3 / spread / 2**0.5:.3f} [")
    geli[1]["points"][-1]["kl"] = 0.1  # too little for an efficiency
    few = rows(geli, references)[0]["efficiency"]
    assert few.startswith(f"{0.2 / 3 / spread / 2**0.5:.3f} [") and few.endswith("] (of 1)")


def chosen(*points, reward="truth"):
    """A result of best-of-n with these (KL, hidden reward of each response), n = 1, 2, 4, …"""
    golds = [{"n": 2**i, "kl": kl, "gold": [gold] * 3} for i, (kl, gold) in enumerate(points)]
    more = {"algo": "best-of-4", "reward": reward, "order": [1.0, 0.5, None], "within": 0.5}
    return {**results((0, 0, 0))[0][0], **more, "points": golds}


def test_a_gain_is_compared_with_that_of_best_of_n_at_the_same_kl():
    best = chosen((0.0, 0.2), (1.0, 0.4), (4.0, 0.5))
    assert best_of_gain(best, 0.25, 1.0, {}) == pytest.approx(0.1)  # half way in the root
    assert best_of_gain(best, 2.25, 1.0, {}) == pytest.approx(0.25)
    assert best_of_gain(best, 8.0, 0.5, {}) == pytest.approx(0.88 * 0.5 * 4)  # beyond the largest n
    assert best_of_gain({**best, "reward": "GE"}, 8.0, 0.5, {}) is None
    runs, references = results((0.2, 0.5, 0.1))
    first, second = rows([{**runs[0], "reward": "truth"}, best], references)
    assert first["of best-of-n"].startswith(f"{0.2 / 3 / 0.2:.3f} [") and second["of best-of-n"] is None
    assert rows([runs[0], best], references)[0]["of best-of-n"] is None  # of another reward
    fewer = chosen((0.0, 0.2), (1.0, 0.3)) | {"algo": "best-of-2"}
    for both in ([fewer, best], [best, fewer]):  # the one with the most samples counts
        assert rows([{**runs[0], "reward": "truth"}, *both], references)[0]["of best-of-n"] == first["of best-of-n"]
    assert rows([best], references, later_half=True) == []


def test_best_of_n_has_a_row_for_each_n():
    of_both = [chosen((0.0, 0.2), (1.0, 0.4), (4.0, 0.5)), chosen((0.0, 0.2), (0.9, 0.3), (3.0, 0.6), reward="GE")]
    found = best_of_rows(of_both, {})
    assert [(row["reward"], row["n"], row["KL"]) for row in found] == [
        ("truth", 2, 1.0), ("truth", 4, 4.0), ("GE", 2, 0.9), ("GE", 4, 3.0),
    ]  # fmt: skip
    assert [row["gain"][:6] for row in found] == ["0.200 ", "0.300 ", "0.100 ", "0.400 "]
    assert [(row["first's less this"] or "")[:6] for row in found] == ["", "", "0.100 ", "-0.100"]


def test_gains_in_training_are_of_the_last_fifth_over_the_first_three_steps():
    runs, references = results((0.2, 0.5, 0.1))
    spread = {"score_std": 2.0, "gold_std": 0.5}
    steps = [{"score_mean": 1.0, "gold_mean": 0.1, "kl": 0.0, **spread}] * 8
    steps += [{"score_mean": 2.0, "gold_mean": 0.5, "kl": 2.0, **spread}] * 2
    (row,) = rows([{**runs[0], "steps": steps}], references)
    assert [row[f"{of} in training"] for of in ("own gain", "hidden gain", "efficiency")] == pytest.approx(
        [0.5, 0.8, 0.4]
    )
    (untold,) = rows(runs, references)
    assert untold["own gain in training"] is None


def test_words_are_listed_by_the_change_of_their_share():
    (row,) = phrases(*results((0.2, 0.5, 0.1)))
    assert row["more often"].startswith("nice +67, ! +33") and row["less often"].startswith("no -33")


def test_the_command_line_has_the_defaults_of_the_options(monkeypatch):
    seen = []
    monkeypatch.setattr(command, "closed_loop", seen.append)
    command.main(command.parse_options(["out", "--data_dir", "d", "--encoder", "e"]))
    assert seen == [LoopOptions(Path("out"), "d", "e")]


@pytest.mark.parametrize("algo", ["ppo", "distill", "rloo", "grpo"])
def test_stage_3_takes_the_options_of_every_algorithm(algo, tmp_path):
    options = LoopOptions(out=tmp_path, data_dir="", encoder="")
    _, *words = closed_loop.policy_command(options, PolicyRun("random", algo, 0))
    assert train_rl_GELI.parse_options(list(map(str, words))).rl.algo == algo


@pytest.mark.parametrize(
    ("algo", "learning_rate", "lam", "optimizer"),
    [("ppo --lam 1", 5e-3, 1.0, "adamw"), ("ppo-published --learning_rate 2e-3", 2e-3, 0.95, "adafactor")],
)
def test_an_algorithm_is_run_with_other_options(algo, learning_rate, lam, optimizer, tmp_path):
    _, *words = closed_loop.policy_command(
        LoopOptions(out=tmp_path, data_dir="", encoder=""), PolicyRun("random", algo, 0)
    )
    found = train_rl_GELI.parse_options(list(map(str, words)))
    assert (found.rl.algo, found.ppo.learning_rate, found.ppo.lam, found.ppo.optimizer) == (
        "ppo", learning_rate, lam, optimizer,
    )  # fmt: skip
    assert " " not in found.rl.exp_name


def test_many_options_make_names_that_file_systems_take():
    short, long, other = (PolicyRun("GE", f"ppo --lam 0.{number}", 0).name for number in ("9", "9" * 300, "9" * 301))
    assert short == "GE-ppo_--lam_0.9-0" and long.startswith("GE-ppo_--lam_0.999") and long != other
    assert len(long) == len(other) < 120


def test_a_head_is_trained_with_other_options(tmp_path):
    options = LoopOptions(out=tmp_path, data_dir="", encoder="encoder")
    plain, changed = (
        list(closed_loop.head_commands(options, PolicyRun(reward, "ppo", 3)))
        for reward in ("GELI", "GELI --heads 5 --decorrelate 1")
    )
    assert [name for name, _ in plain] == ["LI-3", "GELI-3"] and plain[0] == changed[0]  # both begin from one LI head
    name, (script, *words) = changed[1]
    found = train_reward_GELI.parse_options(list(map(str, words)))
    assert (found.training.heads, found.training.decorrelate, found.training.affect_path) == (5, 1.0, "LI-3")
    assert script == "train_reward_GELI.py" and " " not in name and name != "GELI-3"
    assert [name for name, _ in closed_loop.head_commands(options, PolicyRun("GE", "ppo", 3))] == ["GE-3"]
    assert not list(closed_loop.head_commands(options, PolicyRun("truth", "ppo", 3)))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"rewards": ("LI --heads 5",)}, "--rewards"),
        ({"rewards": ("geli",)}, "GELI, GE, LI, truth or random"),
        ({"algorithms": ("best-of-8 --lam 1",)}, "--algorithms"),
        ({"algorithms": ("best-of-8 --ensemble",)}, "mean or lower"),
        ({"algorithms": ("best-of-8 --ensemble lower",), "rewards": ("LI",)}, "with GE or GELI"),
        ({"algorithms": ("best-of-x",)}, "a number of samples"),
        ({"algorithms": ("ppo --sft_steps 5 --instruction=A",)}, "--instruction, --sft_steps"),
        ({"algorithms": ("ppo --algo distill",)}, "--algo must be the same"),
        ({"rewards": ("GE --affect_path x",)}, "--affect_path must be the same"),
    ],
)
def test_what_would_be_ignored_or_wrong_is_refused(changed, named, tmp_path):
    with pytest.raises(UserError, match=named):
        closed_loop.closed_loop(LoopOptions(out=tmp_path, data_dir="", encoder="", **changed))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"algorithms": ("pp0",)}, "pp0"), ({"algorithms": ("ppo --lamda 1",)}, "--lamda"),
     ({"rewards": ("GELI --hedas 5",)}, "--hedas"), ({"algorithms": ("distill --lam 1",)}, "--lam is for --algo ppo")],
)  # fmt: skip
def test_options_that_a_command_would_refuse_are_found_before_any_is_run(changed, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        closed_loop.closed_loop(LoopOptions(out=tmp_path, data_dir="", encoder="", **changed))
    assert refused.value.code == 2 and named in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_folder_is_of_one_experiment(tmp_path):
    first = LoopOptions(out=tmp_path, data_dir="a", encoder="b")
    closed_loop.check_folder(first)
    closed_loop.check_folder(replace(first, seeds=(9,), rewards=("truth",)))
    with pytest.raises(UserError, match=r"--steps 9: .* was made with 50"):
        closed_loop.check_folder(replace(first, steps=9))
    closed_loop.check_folder(replace(first, out=tmp_path / "more", shared=tmp_path, steps=9))
    with pytest.raises(UserError, match=r"--encoder c: .* was made with b"):
        closed_loop.check_folder(replace(first, out=tmp_path / "other", shared=tmp_path, encoder="c"))
    with pytest.raises(UserError, match=r"--shared .*typo: expected an earlier command's folder"):
        closed_loop.check_folder(replace(first, out=tmp_path / "other", shared=tmp_path / "typo"))
    assert not (tmp_path / "other").exists() and not (tmp_path / "typo").exists()


def test_every_reward_is_tried_before_the_other_algorithms():
    options = LoopOptions(out=None, data_dir="", encoder="", seeds=(3, 4))
    runs = list(closed_loop.policy_runs(options))
    assert len(runs) == 30 and runs[0] == PolicyRun("GELI", "ppo", 3) and runs[5] == PolicyRun("GELI", "ppo", 4)
    assert [run.reward for run in runs[10:15]] == list(options.rewards) and runs[10].algo == "distill"
