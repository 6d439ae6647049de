"""Distributed execution with local processes or Ray, and DeepSpeed ZeRO. Code of the ranks does not import Ray."""
