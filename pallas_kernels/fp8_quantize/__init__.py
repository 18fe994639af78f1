"""FP8 quantisation by tiles and blocks, each with a scale of its own."""
