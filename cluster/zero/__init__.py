"""DeepSpeed's ZeRO: engines, shards, checkpoints. Imports no Ray."""
