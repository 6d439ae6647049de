"""Transfer of a choice to another size of the model, and its evaluation."""
