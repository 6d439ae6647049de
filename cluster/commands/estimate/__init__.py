"""``adapeft estimate``: memory and traffic of a run, before it runs."""
