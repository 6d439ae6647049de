"""Terminal output and exit statuses."""
