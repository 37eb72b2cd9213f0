#!/usr/bin/env bash
# What one large GPU reaches, in at most nine minutes; writes to $OUT, or to the folder that is given. See on_a_gpu.py.
exec "${PYTHON:-python3}" "$(dirname "$0")/on_a_gpu.py" "$@"
