"""A config as a whole: read, checked, compared and written; and what the commands beside a run are asked."""
