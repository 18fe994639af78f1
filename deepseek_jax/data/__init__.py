"""Text to rows of tokens: corpora, their held-out split, packing, resumable batches."""
