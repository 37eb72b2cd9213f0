"""What the stages report: files, tables, pictures and a page for each run."""
