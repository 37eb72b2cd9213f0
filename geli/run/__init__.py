"""Running a command: options, files, checkpoints, processes, wandb."""
