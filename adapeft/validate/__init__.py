"""Does the influence predict? Random subsets are trained briefly, and what they gain is held against the forecast."""
