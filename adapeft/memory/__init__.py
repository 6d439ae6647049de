"""Memory: bytes that measuring and training hold, and a budget in bytes."""
