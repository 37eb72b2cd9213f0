#!/usr/bin/env bash
# The whole path on a made-up corpus with small models, on a CPU, in minutes: environment, data, models, three stages.
#   bash demo.sh [FOLDER]     FOLDER (default demo_out) is the demo's own and is made anew
set -euo pipefail
cd "$(dirname "$0")"
out=demo_out
[ $# -eq 0 ] || out=$(cd "$OLDPWD" && realpath -m "$1")
source tools/setup_env.sh
setup_env requirements.txt

export HF_HUB_OFFLINE=1 WANDB_MODE=offline
if [ -e "$out" ] && ! [ -f "$out/.made-by-demo" ] && [ -n "$(ls -A "$out")" ]; then
    echo "$out exists and was not made by this demo: name another folder" >&2
    exit 2
fi
rm -rf "$out"
mkdir -p "$out"
touch "$out/.made-by-demo"

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
data=(--data_dir "$out/candor" --output_dir "$out")
small=(--preset small --small_model_shrink --val)
stage2=(train_reward_GELI.py --train --train_size 100 "${small[@]}" "${data[@]}")

step "Sample corpus, and small models trained on it"
python tools/sample_candor.py "$out/candor" --tiny "$out/models"

step "Stage 1: LI, from the listeners' faces"
python train_reward_LI_only.py "${small[@]}" --lang_model_path "$out/models/bart" --run_name demo-li "${data[@]}"

step "Stage 2: GE alone, from the scores"
python "${stage2[@]}" --lang_model_path "$out/models/bart" --run_name demo-ge

step "Stage 2: GELI, from both"
python "${stage2[@]}" --affect_path demo-li --run_name demo-geli

step "Stage 3: PPO on the GELI reward"
python train_rl_GELI.py --model_name "$out/models/llama" --exp_name GELI --reward redistributed_reward --rf_model GELI \
    --preset small --train --val --steps 50 --context_turns 4 "${data[@]}"

python tools/demo_report.py "$out"
