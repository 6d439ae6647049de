"""``adapeft subsets``: the store of named subsets."""
