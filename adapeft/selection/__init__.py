"""From a model and data to a subset: measuring and choosing by a method, within a budget."""
