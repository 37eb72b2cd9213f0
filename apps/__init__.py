"""Programs that use what was trained: each folder is one, run as `python -m apps.NAME`."""
