"""AdaPEFT: influence from gradient and curvature, chosen by a knapsack."""
