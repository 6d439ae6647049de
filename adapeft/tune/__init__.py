"""Training a subset: small ordinary leaf parameters beside a frozen model, for any trainer."""
