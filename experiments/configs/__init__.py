"""Run configurations: each file has `get_config(arg=None)`."""
