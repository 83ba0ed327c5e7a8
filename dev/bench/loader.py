"""How fast are batches made, compared with how fast training uses them?

    python -m dev.bench.loader --max-seq-len 512 --consumes 8600

Prepared tokens of `--data` are needed (python -m nanochat.dataset). `--consumes` is the speed of training in tokens per second,
as `dev.bench.train_step` prints it.
"""

import time
from dataclasses import dataclass

from nanochat.benchmarks.flags import OutputFlags
from nanochat.cli.flags import flag, parse
from nanochat.cli.program import cli
from nanochat.common import format_table
from nanochat.data.sources import SourceFlags


@dataclass
class BenchFlags(OutputFlags, SourceFlags):
    """The bench"""
    max_seq_len: int = flag(512, "tokens per row", low=1)
    device_batch_size: int = flag(8, "rows per batch", low=1)
    batches: int = flag(3000, "batches to time", low=1)
    consumes: float = flag(8600.0, "tokens per second that training uses", low=0)

    def validate(self) -> list[str]:
        return OutputFlags.validate(self) + SourceFlags.validate(self)


def main() -> None:
    flags, = parse([BenchFlags], prog="python -m dev.bench.loader")
    import torch

    from nanochat.benchmarks.result_file import make_result, write_json
    from nanochat.dataloader import PackedRows, TrainLoader
    from nanochat.dataset import TokenDataset, prepare_tokens
    from nanochat.tokenizer import get_tokenizer
    started = time.monotonic()
    tokens = TokenDataset.open(prepare_tokens(flags.data, get_tokenizer(), **flags.reading()))
    rows = PackedRows(tokens.split("train"), flags.max_seq_len, seed=0)
    loader = TrainLoader(rows, device_batch_size=flags.device_batch_size, grad_accum_steps=1, rank=0, world_size=1,
                         device=torch.device("cpu"))
    loader.start(0)
    begun = time.perf_counter()
    for _ in range(flags.batches):
        loader.next()
    rate = flags.batches * flags.device_batch_size * flags.max_seq_len / (time.perf_counter() - begun)
    loader.close()
    results = {"loader": {"tok_per_sec": rate, "times_what_training_takes": rate / flags.consumes, **rows.report()}}
    print(format_table([{k: round(v, 4) if v < 1 else round(v) for k, v in results["loader"].items()}]))
    write_json(flags.json_out, make_result("dev/bench/loader.py", torch.device("cpu"), vars(flags), results,
                                           time.monotonic() - started))


if __name__ == "__main__":
    cli(main)
