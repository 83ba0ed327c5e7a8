"""The shape of an exported nanochat model, as transformers keeps it in config.json."""

from transformers import PretrainedConfig


class NanochatConfig(PretrainedConfig):
    """Sizes under the names that transformers uses elsewhere, and what is particular to this architecture:

    windows: for each layer, how many tokens before itself a token attends to.
    value_embedding_layers: the layers that add a value embedding to their values.
    backout_layer: the layer whose output, times a learned factor, is subtracted before the last norm.
    short_conv: tokens that the convolutions before attention and MLP see, with their own; 0 is none.
    exclusive_attention: whether attention's output has no part along the token's own value (arXiv 2603.09078).
    qk_scale: factor of queries and keys after their norm.   logit_softcap: bound of the logits.   rotary_base: of the positions.
    """

    model_type = "nanochat_home"  # "nanochat" is a model of transformers itself, of an older architecture

    def __init__(self, vocab_size=32768, hidden_size=768, num_hidden_layers=12, num_attention_heads=6, num_key_value_heads=6,
                 max_position_embeddings=2048, windows=(), value_embedding_layers=(), backout_layer=6, smear_channels=24,
                 gate_channels=12, qk_scale=1.2, logit_softcap=15.0, rotary_base=100000.0, short_conv=0,
                 exclusive_attention=False, use_cache=True,
                 **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings  # tokens of context in training
        self.windows = list(windows) or [max_position_embeddings] * num_hidden_layers
        self.value_embedding_layers = list(value_embedding_layers)
        self.backout_layer = backout_layer
        self.smear_channels = smear_channels
        self.gate_channels = gate_channels
        self.qk_scale = qk_scale
        self.logit_softcap = logit_softcap
        self.rotary_base = rotary_base
        self.short_conv = short_conv
        self.exclusive_attention = exclusive_attention
        self.use_cache = use_cache
        kwargs.pop("head_dim", None)  # in config.json for other programs: it follows from the sizes
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
