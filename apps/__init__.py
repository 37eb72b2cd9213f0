"""Programs that use GELI: each has a folder with its command, its modules and its requirements."""
