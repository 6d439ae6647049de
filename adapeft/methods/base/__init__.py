"""What methods have in common: the interface of a method, and of a rule."""
