"""Checkpoints from and to the Hugging Face form that DeepSeek releases its models in."""
