"""Do two checkouts of this repository give the same numbers? To be run after a change that should not change any.

    python benchmarks/same_numbers.py BEFORE [--after .] [--casino FOLDER] [--work FOLDER]

Runs all three stages of both checkouts on the same sample corpus, and on the first 120 conversations of CaSiNo where
its folder is given, with the same small models (which BEFORE makes) and one seed, and compares what they write: the
tables of turn rewards, the metrics, the PPO step tables, the responses, and all trained weights. Prints the files that
differ, each with the largest difference of its numbers. Results of BEFORE are kept in the work folder, so that only the
other checkout runs again.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
from safetensors.torch import load_file

STAGE_1 = "train_reward_LI_only.py --val --small_model_shrink --batch_size 32 --K 4 --learning_rate 1e-4"
STAGE_2 = "train_reward_GELI.py --train --val --batch_size 4 --K 8 --context_turns 3"
STAGE_3 = (  # some of the heads have learned little
    "train_rl_GELI.py --batch_size 8 --learning_rate 2e-3 --context_turns 4 --allow_constant_reward"
)
RUNS = {  # name -> command; {bart} and {llama} are the small models
    "li": f"{STAGE_1} --epochs 2 --contrastive --context_turns 3 --lang_model_path {{bart}} --run_name li",
    "li-sent": f"{STAGE_1} --epochs 1 --curriculum_exposure --reaction_type mean --li_signal sentiment "
    "--context_turns 3 --lang_model_path {bart} --run_name li-sent",
    "ge": f"{STAGE_2} --redist_type IRCR --hard_shrink --epochs 2 --lang_model_path {{bart}} --run_name ge",
    "rudder": f"{STAGE_2} --redist_type RUDDER --epochs 2 --lang_model_path {{bart}} --run_name rudder",
    "geli": f"{STAGE_2} --small_model_shrink --epochs 4 --loss_scale normalized --contrastive --affect_path li "
    "--run_name geli",
    "unfrozen": f"{STAGE_2} --small_model_shrink --epochs 1 --unfreeze --curriculum --lambda 0.3 --ep_len actual "
    "--affect_path li --negative_affect negative --run_name unfrozen",
    "val-all": "train_reward_GELI.py --val --val_all --train_size 10 --reward_path geli --run_name val-all",
    "ppo": f"{STAGE_3} --model_name {{llama}} --exp_name P --reward_path geli --train --val --generate --steps 6 "
    "--val_prompts 16",
    "ppo-rudder": f"{STAGE_3} --model_name {{llama}} --exp_name R --reward_path rudder --train --steps 2",
    "sft": f"{STAGE_3} --model_name {{llama}} --exp_name S --rf_model LI --train --val --steps 2 --sft_steps 3 "
    "--val_prompts 16",
    "grpo": f"{STAGE_3} --model_name {{llama}} --exp_name G --rf_model GELI --train --steps 2 --algo grpo",
    "rloo": f"{STAGE_3} --model_name {{llama}} --exp_name O --rf_model GE --train --steps 2 --algo rloo",
}
METRIC_DIGITS = 12  # that metrics in JSON files agree to: Spearman's correlation was pandas' ranks once, and is scipy's
TIMED = ("seconds", "step_time")  # columns that differ from run to run


def script(checkout: Path, name: str) -> str:
    """The path of a command, which may be in tools/ or at the root."""
    return str(next(path for path in (checkout / name, checkout / "tools" / name) if path.is_file()))


def call(checkout: Path, name: str, *options: str, log: Path) -> None:
    """Runs a command of a checkout with that checkout's modules."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "PYTHONHASHSEED": "random"}
    environment |= {"OMP_NUM_THREADS": "1"}
    with open(log, "a", encoding="utf-8") as file:
        command = [sys.executable, script(checkout, name), *options]
        if subprocess.run(command, stdout=file, stderr=file, env=environment, check=False).returncode:
            raise SystemExit(f"{' '.join(command)} failed: see the end of {log}")


def make_corpora(before: Path, work: Path, casino: str | None) -> list[str]:
    """The corpora and the small models; returns the corpora's names."""
    log = work / "corpora.txt"
    names = ["sample", *(["casino"] if casino else [])]
    if not (work / "sample").exists():
        call(before, "sample_candor.py", str(work / "sample"), "--conversations", "60", log=log)
    if casino and not (work / "casino").exists():
        call(before, "convert_corpus.py", "casino", casino, str(work / "casino"), log=log)
        for folder in sorted((work / "casino").iterdir())[120:]:
            shutil.rmtree(folder)
    for name in names:
        if not (work / f"{name}_models").exists():
            call(before, "tiny_models.py", str(work / name), str(work / f"{name}_models"), "--steps", "60", log=log)
    return names


def run_all(checkout: Path, work: Path, corpus: str, out: Path) -> None:
    """Every command of `RUNS` on one corpus; those that are done are not done again."""
    out.mkdir(exist_ok=True)
    models = work / f"{corpus}_models"
    for name, command in RUNS.items():
        if (out / f"{name}.done").exists():
            continue
        first, *options = command.format(bart=models / "bart", llama=models / "llama").split()
        call(checkout, first, *options, "--data_dir", str(work / corpus), "--output_dir", str(out), log=out / "log.txt")
        (out / f"{name}.done").touch()
        print(f"{corpus} {name}: done", flush=True)


def content(path: Path):
    """What a file says, without times and without names of folders."""
    if path.suffix == ".csv":
        table = pd.read_csv(path, dtype=str)
        return table[[name for name in table if not name.startswith(TIMED)]].to_dict("list")
    if path.suffix == ".json":
        found = json.loads(path.read_text(encoding="utf-8"))
        keys = ("metrics", "training_conversations", "validation_conversations", "data")
        return {key: rounded(found.get(key)) for key in keys}
    return {name: (tensor.dtype, tensor.tolist()) for name, tensor in load_file(path).items()}


def rounded(value):
    """A JSON value whose numbers are rounded to `METRIC_DIGITS` significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.{METRIC_DIGITS}g}") if isinstance(value, float) else value


def difference(a, b) -> float:
    """The largest difference of numbers at the same places of two contents; infinite where anything else differs."""
    if a is b or a == b:
        return 0.0
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return max(difference(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return max(map(difference, a, b))
    try:
        return abs(float(a) - float(b))
    except (TypeError, ValueError):
        return math.inf


def outputs(out: Path) -> dict[str, Path]:
    """Name -> path of the files that are compared."""
    kinds = ("val_turn_rewards_*.csv", "reward1_*", "*_steps.csv", "*_responses.csv", "*.json", "*.safetensors")
    found = {
        path for kind in kinds for folder in ("*", "*/*") for path in out.glob(f"{folder}/{kind}") if path.is_file()
    }
    found = {path for path in found if path.parts[len(out.parts)] not in ("cache", "wandb")}
    skipped = ("adapter_config.json", "config.json", "tokenizer", "generation_config.json", "special_tokens")
    return {str(path.relative_to(out)): path for path in sorted(found) if not path.name.startswith(skipped)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Compare the numbers of two checkouts.")
    parser.add_argument("before", type=Path, help="the other checkout, such as a git worktree")
    parser.add_argument("--after", type=Path, default=Path(__file__).resolve().parents[1], help="this one")
    parser.add_argument("--casino", help="folder with CaSiNo's JSON files")
    parser.add_argument("--work", type=Path, default=Path("same_numbers_out"), help="where everything is made")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    different = compared = 0
    for corpus in make_corpora(args.before.resolve(), work, args.casino):
        old, new = work / f"{corpus}_before", work / f"{corpus}_after"
        run_all(args.before.resolve(), work, corpus, old)
        shutil.rmtree(new, ignore_errors=True)
        run_all(args.after.resolve(), work, corpus, new)
        files = {
            name: [found.get(name) for found in (outputs(old), outputs(new))] for name in outputs(old) | outputs(new)
        }
        for name, (a, b) in files.items():
            by = difference(content(a), content(b)) if a and b else math.inf
            compared, different = compared + 1, different + (by != 0)
            if by:
                print(f"{corpus} {name}: {f'DIFFERENT by {by:.2g}' if a and b else 'only in one of them'}")
    print(f"{compared} files compared, {different} different")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
