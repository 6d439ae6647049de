"""Machines: Ray launches and watches, DeepSpeed shards and steps. What runs on a rank imports no Ray."""
