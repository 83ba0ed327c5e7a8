"""The shape of a model and what follows from it by arithmetic alone: windows, parameter counts, FLOPs. No torch.

Counts come from the configuration, never from the modules in place, so they are the same whatever linear class, loss
or attention a feature has swapped in.
"""

from dataclasses import dataclass

VE_GATE_CHANNELS = 12     # the value-embedding gate reads this many channels of the block's input
SMEAR_GATE_CHANNELS = 24  # the smear gate reads this many channels of the embedding
VOCAB_MULTIPLE = 64       # the vocabulary is padded to a multiple of this, which matrix units like
MUON_BATCH = 2**25        # elements of matrices that Muon updates at once, or a matrix if that is larger
WINDOW_TILE = 128         # short windows are rounded up to a multiple of this, as attention kernels work in tiles


@dataclass
class GPTConfig:
    """Shape of a model. `window_pattern`: S = a quarter of the context, L = all of it, tiled over layers, last always L."""
    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


def shape_of_depth(depth: int, aspect_ratio: int = 64, head_dim: int = 128, *, sequence_len: int = 2048,
                   vocab_size: int = 32768, window_pattern: str = "SSSL") -> GPTConfig:
    """The model of a depth: width = depth x aspect_ratio, rounded up to whole heads."""
    heads = -(-depth * aspect_ratio // head_dim)
    return GPTConfig(sequence_len=sequence_len, vocab_size=vocab_size, n_layer=depth, n_head=heads, n_kv_head=heads,
                     n_embd=heads * head_dim, window_pattern=window_pattern)


def has_value_embedding(layer: int, n_layer: int) -> bool:
    """Every second layer, counted from the last, which always has one."""
    return layer % 2 == (n_layer - 1) % 2


def window_sizes(config: GPTConfig) -> list[int]:
    """Per layer, how many earlier tokens a token attends to (besides itself); the whole context for L layers."""
    short = -(-config.sequence_len // 4 // WINDOW_TILE) * WINDOW_TILE
    sizes = {"S": min(short, config.sequence_len), "L": config.sequence_len}
    pattern = config.window_pattern.upper()
    windows = [sizes[pattern[i % len(pattern)]] for i in range(config.n_layer)]
    windows[-1] = config.sequence_len
    return windows


def padded_vocab_size(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def param_counts(config: GPTConfig) -> dict[str, int]:
    """Parameters by role: block_matrices, lm_head, wte, value_embeds, scalars, and their total."""
    n, width, vocab = config.n_layer, config.n_embd, padded_vocab_size(config.vocab_size)
    kv_dim = config.n_kv_head * config.head_dim
    with_ve = sum(has_value_embedding(i, n) for i in range(n))
    per_block = 2 * width * width + 2 * width * kv_dim + 8 * width * width  # q and proj, k and v, fc and proj
    counts = {
        "block_matrices": n * per_block + with_ve * VE_GATE_CHANNELS * config.n_kv_head,
        "lm_head": vocab * width,
        "wte": vocab * width,
        "value_embeds": with_ve * vocab * kv_dim,
        "scalars": 2 * n + SMEAR_GATE_CHANNELS + 2,
    }
    return counts | {"total": sum(counts.values())}


def scaling_params(config: GPTConfig) -> int:
    """The parameters that data is scaled with: block matrices and lm_head (tables only look things up)."""
    counts = param_counts(config)
    return counts["block_matrices"] + counts["lm_head"]


def flops_per_token(config: GPTConfig, causal: bool = False) -> int:
    """FLOPs of forward and backward per token: 6 per matmul parameter, 12 x heads x head_dim x window for attention.

    As is customary (PaLM, arXiv 2204.02311) the masked half of attention is counted too; `causal=True` counts only
    the keys that a query can see, on average over a row.
    """
    def keys(window):
        visible = min(window, config.sequence_len)
        return visible - visible * visible / (2 * config.sequence_len) if causal else visible
    attention = sum(12 * config.n_head * config.head_dim * keys(w) for w in window_sizes(config))
    return 6 * (scaling_params(config) + SMEAR_GATE_CHANNELS) + int(attention)
