"""``adapeft submit``, ``status``, ``logs`` and ``stop``: runs as jobs of a Ray cluster."""
