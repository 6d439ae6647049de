"""Rules: what a method does to dense leaves in the forward pass, at the optimizer's step and at a projection."""
