"""What a run starts from: the model and its structure, the data, the objective."""
