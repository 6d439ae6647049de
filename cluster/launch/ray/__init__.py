"""The Ray launcher: workers on a Ray cluster, or on a local one that ends with the command."""
