"""Training a subset: small ordinary leaf parameters next to a frozen model, for any trainer."""
