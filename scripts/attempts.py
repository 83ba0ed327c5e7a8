"""The attempts: `python -m scripts.attempts --help`, attempts/README.md."""

from nanochat.benchmarks.attempts_cli import main
from nanochat.cli.program import cli

if __name__ == "__main__":
    cli(main)
