"""Child-Tuning: gradients of a task's child network alone, drawn (F) or chosen (D)."""
