"""For tools that look for this file: the configuration is all in pyproject.toml."""

from setuptools import setup

setup()
