"""Ray: workers of a cluster, or of a local one that ends with the command."""
