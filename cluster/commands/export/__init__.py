"""``adapeft export``: a delta or a subset in the formats of other tools."""
