"""The sweep of learning rates by successive halving (ASHA), with Ray Tune."""
