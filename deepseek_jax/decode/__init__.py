"""Decoding with a cache of latents: sampling and multi-token speculation."""
