"""What can be known of a run before anything is measured: inputs, budget, memory."""
