"""Launchers: what starts workers, on this machine or on a Ray cluster, and what they run."""
