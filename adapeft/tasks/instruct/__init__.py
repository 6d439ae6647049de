"""Instruction tuning: formats of conversations, chat templates, and the tokens that are trained."""
