"""One matmul per expert over rows sorted by expert and padded to whole blocks."""
