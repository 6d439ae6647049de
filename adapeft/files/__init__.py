"""Files: written atomically, checked when they are read, one per rank for distributed data."""
