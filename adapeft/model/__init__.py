"""The pretrained model: loading, checkpoints, structure, fingerprint, and running it without weights."""
