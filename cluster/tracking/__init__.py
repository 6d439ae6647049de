"""Trackers that a run reports to: TensorBoard, Weights & Biases, MLflow."""
