"""Choice within a budget: knapsack over groups, top-k of elements, options, joint influence."""
