"""``adapeft push``: upload the delta of a run to the Hugging Face Hub; merged checkpoints use its parts too."""
