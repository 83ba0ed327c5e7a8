"""The shape of a model, and what follows from it by arithmetic: attention windows, parameter counts, FLOPs. No torch.

Everything is counted from the configuration, not from the modules, so the numbers stay the same whatever linear layer, loss or
attention an optimization has put in place.
"""

from dataclasses import dataclass

VE_GATE_CHANNELS = 12     # channels of a block's input that the value-embedding gate reads
SMEAR_GATE_CHANNELS = 24  # channels of the embedding that the smear gate reads
VOCAB_MULTIPLE = 64       # the vocabulary is padded to a multiple: tensor cores are slow on odd sizes
MUON_BATCH = 2**25        # elements: Muon stacks matrices of one shape up to this size, but at least one
WINDOW_TILE = 128         # short windows are rounded up to a multiple: attention kernels work in tiles


@dataclass
class GPTConfig:
    """Shape of a model. The defaults are d12."""
    sequence_len: int = 2048      # tokens of context in training
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6               # query heads
    n_kv_head: int = 6            # key/value heads; fewer than n_head is grouped-query attention
    n_embd: int = 768             # width of the residual stream
    window_pattern: str = "SSSL"  # per layer, repeated: S sees a quarter of the context, L all of it; the last is always L
    short_conv: int = 0           # tokens that the convolutions before attention and MLP see, with their own; 0: none
    exclusive_attention: bool = False  # whether attention's output has no part along the token's own value

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


def shape_of_depth(depth: int, aspect_ratio: int = 64, head_dim: int = 128, *, sequence_len: int = 2048,
                   vocab_size: int = 32768, window_pattern: str = "SSSL", short_conv: int = 0,
                   exclusive_attention: bool = False) -> GPTConfig:
    """The shape of depth `depth`: width = depth * aspect_ratio, rounded up to a multiple of head_dim."""
    heads = -(-depth * aspect_ratio // head_dim)
    return GPTConfig(sequence_len=sequence_len, vocab_size=vocab_size, n_layer=depth, n_head=heads, n_kv_head=heads,
                     n_embd=heads * head_dim, window_pattern=window_pattern, short_conv=short_conv,
                     exclusive_attention=exclusive_attention)


def has_value_embedding(layer: int, n_layer: int) -> bool:
    """Whether a layer has a value embedding: every second one does, and the last always."""
    return layer % 2 == (n_layer - 1) % 2


def window_sizes(config: GPTConfig) -> list[int]:
    """Attention window of each layer: how many tokens before itself a token attends to; `sequence_len` in L layers."""
    short = -(-config.sequence_len // 4 // WINDOW_TILE) * WINDOW_TILE
    sizes = {"S": min(short, config.sequence_len), "L": config.sequence_len}
    pattern = config.window_pattern.upper()
    windows = [sizes[pattern[i % len(pattern)]] for i in range(config.n_layer)]
    windows[-1] = config.sequence_len
    return windows


def padded_vocab_size(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def param_counts(config: GPTConfig) -> dict[str, int]:
    """Number of parameters by role: block_matrices, short_convs, lm_head, wte, value_embeds, scalars, total."""
    n, width, vocab = config.n_layer, config.n_embd, padded_vocab_size(config.vocab_size)
    kv_dim = config.n_kv_head * config.head_dim
    with_ve = sum(has_value_embedding(i, n) for i in range(n))
    per_block = 2 * width * width + 2 * width * kv_dim + 8 * width * width  # c_q and c_proj, c_k and c_v, MLP
    counts = {
        "block_matrices": n * per_block + with_ve * VE_GATE_CHANNELS * config.n_kv_head,
        "short_convs": 2 * n * max(0, config.short_conv - 1) * width,
        "lm_head": vocab * width,
        "wte": vocab * width,
        "value_embeds": with_ve * vocab * kv_dim,
        "scalars": 2 * n + SMEAR_GATE_CHANNELS + 2,
    }
    return counts | {"total": sum(counts.values())}


def scaling_params(config: GPTConfig) -> int:
    """Number of parameters that scaling laws count here: block matrices and lm_head, not the embedding tables."""
    counts = param_counts(config)
    return counts["block_matrices"] + counts["lm_head"]


def flops_per_token(config: GPTConfig, causal: bool = False) -> int:
    """FLOPs of forward and backward per token: 6 per matmul parameter, and 12 * n_head * head_dim * window per layer.

    The masked half of attention is counted too, as is usual (PaLM, arXiv 2204.02311). `causal=True` counts only the keys that
    a query sees, on average over a sequence.
    """
    def keys(window):
        visible = min(window, config.sequence_len)
        return visible - visible * visible / (2 * config.sequence_len) if causal else visible
    attention = sum(12 * config.n_head * config.head_dim * keys(w) for w in window_sizes(config))
    return 6 * (scaling_params(config) + SMEAR_GATE_CHANNELS) + int(attention)
