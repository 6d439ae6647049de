"""Whether the influence predicts: random subsets are trained briefly, and choices compared over time."""
