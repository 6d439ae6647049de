"""The multiple-choice knapsack: of each class, either any of its members or one option."""
