"""A GPT that trains at home: one file, one idea. `scripts/base_train.py` is where to start reading."""

__version__ = "0.1.0"
