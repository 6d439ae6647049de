"""The multiple-choice knapsack: some members of each class, or one option that excludes them."""
