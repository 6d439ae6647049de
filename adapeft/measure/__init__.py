"""Statistics of groups of parameters, measured through shards: gradient, curvature, influence."""
