"""Checkpoints from and to the Hugging Face form, which DeepSeek's releases have."""
