"""Output of a run: its folder, its files, its logs, and its copy at a URL."""
