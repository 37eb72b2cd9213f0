#!/usr/bin/env bash
# Lint, then tests, in the demo's environment with the test tools added. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
source tools/setup_env.sh
setup_env requirements.txt tests/requirements.txt

export HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS=1 # a core for each worker
cores=$(nproc --all)
ruff check .
ruff format --check .
lint-imports --no-cache
python -m pytest -n $((cores < 4 ? cores : 4)) --dist loadfile --no-loadscope-reorder "$@"
