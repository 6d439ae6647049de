"""The config of a run: reading, checking, comparing and writing it; and the settings of the other commands."""
