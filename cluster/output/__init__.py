"""A run's output: its folder, its files and what they say, its copy at a URL."""
