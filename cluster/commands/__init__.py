"""Commands, one file or folder each."""
