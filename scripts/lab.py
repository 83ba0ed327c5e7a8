"""The lab: `python -m scripts.lab --help`, docs/lab.md."""

from nanochat.cli.program import cli
from nanochat.lab.cli import main

if __name__ == "__main__":
    cli(main)
