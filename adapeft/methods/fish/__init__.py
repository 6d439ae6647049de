"""FISH: the largest empirical Fisher information, example by example."""
