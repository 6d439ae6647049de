"""Launchers, which start workers on this machine or on a Ray cluster, and the stages that the workers run."""
