"""Attention of new positions over a cache of latents (MLA absorbed, for decoding)."""
