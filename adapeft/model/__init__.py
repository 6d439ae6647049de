"""The pretrained model: loading, checkpoints, structure, fingerprint, and execution without weights."""
