"""From statistics to a subset: the budget, the knapsack, the top-k."""
