"""One FP8 product per expert over rows sorted by expert and padded to whole blocks."""
