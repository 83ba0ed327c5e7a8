"""Prove that a run survives kill -9 to the bit: `python -m scripts.prove_resume --help`."""

from nanochat.cli.program import cli
from nanochat.lab.resume_proof import main

if __name__ == "__main__":
    cli(main)
