"""Causal attention whose value heads are narrower than its query/key heads (MLA, MHA,
GQA).
"""
