"""``adapeft submit`` and ``adapeft jobs``: runs as jobs of a Ray cluster."""
