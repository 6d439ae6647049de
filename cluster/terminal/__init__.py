"""What a person sees, and the exit status."""
