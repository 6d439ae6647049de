"""The machines that execute the runs of a comparison: this one, or those of a Ray cluster."""
