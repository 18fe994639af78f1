"""Products of 8-bit numbers with a scale for every tile or block."""
