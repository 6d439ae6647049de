"""BitFit: the bias terms."""
