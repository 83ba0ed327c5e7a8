"""FP8 training: linear layers multiply 8-bit operands (nanochat/fp8.py); everything else stays as it is.

Layers are chosen by name and size before anything is compiled. An FP8 layer shares its weight with the original layer, which
takes its place again while the model is evaluated, sampled from and saved: so outside of training there is no FP8, and
checkpoints contain none. FLOPs are counted from the model's shape and do not change.
"""

import importlib.util
import math
import os
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace

from nanochat.cli.flags import flag
from nanochat.common import Diverged, UserError, format_table, print0
from nanochat.features.base import Feature
from nanochat.recipe.shape import VE_GATE_CHANNELS, GPTConfig, has_value_embedding, padded_vocab_size

MULTIPLE = 16  # every dimension of an FP8 product must be a multiple of it; the same in nanochat/fp8.py, which loads torch
LARGEST_VOCABULARY = 2**24
PAYS_FROM = 1.02  # speed-up over bf16 from which --fp8-policy auto converts a shape: above the noise of the timing
FP8 = {"fp8": True}
CUSTOM = FP8 | {"fp8_backend": "custom"}


@dataclass
class Fp8Flags:
    """FP8 training"""
    fp8: bool = flag(False, "train the linear layers in FP8")
    fp8_emulate: bool = flag(False, "allow --fp8 on a device without FP8 units: the same numbers, slowly", affects_results=False,
                             requires=FP8)
    fp8_backend: str = flag("custom", "implementation of the layers: nanochat/fp8.py, or torchao", choices=("custom", "torchao"),
                            requires=FP8)
    fp8_recipe: str = flag("tensorwise", "a scale per tensor, or per row (torchao)", choices=("tensorwise", "rowwise"),
                           requires=FP8)
    fp8_policy: str = flag("all", "of the layers that the flags below select: convert all, or (auto) those whose shape is faster "
                           "in FP8 when measured on this device", choices=("all", "auto"), requires=FP8)
    fp8_min_dim: int = flag(128, "exclude layers with fewer inputs or outputs", low=1, requires=FP8)
    fp8_skip_lm_head: bool = flag(False, "exclude the head", requires=FP8)
    fp8_skip_attn_qk: bool = flag(False, "exclude the query and key projections", requires=FP8)
    fp8_include_regex: str | None = flag(None, "only layers whose name contains a match", metavar="REGEX", requires=FP8)
    fp8_exclude_regex: str | None = flag(None, "exclude layers whose name contains a match", metavar="REGEX", requires=FP8)
    fp8_fast_accum: bool = flag(False, "accumulate the forward products with fewer bits, which is faster on Hopper", requires=FP8)
    fp8_weight_grad_bf16: bool = flag(False, "weight gradients of a micro-batch in bf16, not fp32 (torchao's always are)",
                                      requires=CUSTOM)
    fp8_no_allow_in_graph: bool = flag(False, "let torch.compile's front end trace into the FP8 layers", affects_results=False,
                                       requires=CUSTOM)
    fp8_log_modules: bool = flag(False, "list every linear layer, and why it is not converted", affects_results=False,
                                 requires=FP8)
    fp8_debug: bool = flag(False, "check every activation, gradient and scale: name the first module with a NaN or infinity",
                           affects_results=False, requires=FP8 | {"compile": False})


class Fp8(Feature):
    name = "fp8"
    Config = Fp8Flags

    @classmethod
    def enabled(cls, config) -> bool:
        return config.features[cls.name].fp8

    @classmethod
    def validate(cls, config) -> list[str]:
        flags, device_type = config.features[cls.name], config.run.device_type
        if not flags.fp8:
            return []
        problems = []
        for name, pattern in (("include", flags.fp8_include_regex), ("exclude", flags.fp8_exclude_regex)):
            try:
                re.compile(pattern or "")
            except re.error as e:
                problems.append(f"--fp8-{name}-regex {pattern!r} is not a regular expression: {e}")
        if flags.fp8_backend == "custom" and flags.fp8_recipe != "tensorwise":
            problems.append(f"--fp8-recipe {flags.fp8_recipe} is torchao's: add --fp8-backend torchao, or use tensorwise")
        if flags.fp8_backend == "torchao" and not importlib.util.find_spec("torchao"):
            problems.append("--fp8-backend torchao needs that package: pip install torchao, or use --fp8-backend custom")
        if config.divides_weights and flags.fp8_debug:
            problems.append("--fp8-debug looks at whole weights, which --shard-weights divides: leave one of them out")
        if config.divides_weights and flags.fp8_policy == "auto":
            problems.append("--fp8-policy auto may convert other layers on resume, which --shard-weights cannot follow: use all")
        rows = config.horizon.device_batch_size * config.model.max_seq_len
        if rows % MULTIPLE:
            problems.append(f"--fp8 needs micro-batches of a multiple of {MULTIPLE} tokens, not {rows}: "
                            "change --device-batch-size or --max-seq-len")
        if not problems:
            # the tokenizer is not known yet: assume the largest vocabulary, and so the widest head
            excluded = exclusion_reasons(linear_sizes(config.model.shape(LARGEST_VOCABULARY)), flags)
            reason = nothing_to_convert(excluded) or fp8_flag_unavailable_reason(device_type, flags.fp8_emulate)
            problems += [reason] if reason else []
        return problems

    def __init__(self, config):
        super().__init__(config)
        self.tokens = config.horizon.device_batch_size * config.model.max_seq_len  # of a micro-batch
        self.compile = config.run.compile
        self.originals, self.fp8 = {}, {}  # name -> layer, of converted layers: the original, and the FP8 layer in its place
        self.checked = 0                   # tensors that --fp8-debug found finite

    def on_model(self, model, horizon) -> None:
        flags, layers = self.config, model.linears()
        excluded = exclusion_reasons({name: (layer.in_features, layer.out_features) for name, layer in layers.items()}, flags)
        if reason := nothing_to_convert(excluded):
            raise UserError(reason)
        if flags.fp8_policy == "auto":
            shapes = {(layers[name].in_features, layers[name].out_features) for name, why in excluded.items() if not why}
            from nanochat.runtime.distributed import broadcast_object
            gains = broadcast_object(measure_shapes(sorted(shapes), self.tokens, model.compute_dtype, model.get_device(),
                                                    flags, self.compile))
            for name, why in excluded.items():
                gain = gains.get((layers[name].in_features, layers[name].out_features), math.inf)
                if not why and gain < PAYS_FROM:
                    excluded[name] = f"{gain:.2f} times as fast as bf16"
        self.model, self.linears = model, len(layers)
        self._convert([name for name, why in excluded.items() if not why])
        if flags.fp8_log_modules:
            print0(format_table([{"layer": name, "inputs": layer.in_features, "outputs": layer.out_features,
                                  "FP8": f"no: {why}" if (why := excluded[name]) else "yes"} for name, layer in layers.items()]))
        converted = len(self.fp8)
        print0(f"Converted FP8 layers: {converted}/{len(layers)} ({converted / len(layers):.2%})")
        if not converted:
            print0("--fp8-policy auto: no layer is faster in FP8 on this device, so this run trains as without --fp8")

    def _convert(self, names: list[str]) -> None:
        """Convert exactly the layers of these names."""
        for name, layer in self.originals.items():
            self.model.set_submodule(name, layer)
        self.originals = {name: self.model.get_submodule(name) for name in names}
        convert(self.model, names, self.config, self.model.get_device())
        self.fp8 = {name: self.model.get_submodule(name) for name in names}
        self.on_weights_changed()
        if self.config.fp8_debug:
            self._add_checks()

    def on_weights_changed(self) -> None:
        from nanochat.fp8 import refresh_weights
        if self.config.fp8_backend == "custom":
            refresh_weights(self.fp8.values())

    @contextmanager
    def eval_context(self, model):
        for name, layer in self.originals.items():
            model.set_submodule(name, layer)
        try:
            yield
        finally:
            for name, layer in self.fp8.items():
                model.set_submodule(name, layer)

    def summary(self) -> dict:
        return {"fp8_layers": f"{len(self.fp8)}/{self.linears}"}

    def state_dict(self) -> dict:
        return {"layers": list(self.fp8)}

    def load_state_dict(self, state: dict) -> None:
        """Under --fp8-policy auto, convert the layers of the first start: a new measurement could choose others."""
        if self.config.fp8_policy == "auto" and state["layers"] != list(self.fp8):
            self._convert(state["layers"])
            print0(f"{len(self.fp8)} layers are in FP8, the same as before the resume")

    def report(self) -> str | None:
        return f"--fp8-debug: {self.checked:,} activations, gradients and scales checked" if self.config.fp8_debug else None

    def _add_checks(self) -> None:
        """Check the inputs, outputs and gradients of every module in hooks. Inner modules are checked first."""
        import torch

        def check(what: str, name: str, tensors) -> None:
            for tensor in tensors:
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    self.checked += 1
                    bad = tensor.numel() - int(tensor.isfinite().sum())
                    if bad:
                        raise Diverged(f"{what} {name or 'the model'} has {bad} NaN or infinite elements of {tensor.numel()}")

        def check_weight(name):
            if layer := self.fp8.get(name):
                check("the weight of", name, [layer.weight])
                check("the weight's scale of", name, [b for b in layer.buffers() if b.dim() == 0])

        def add_hooks(name, module):
            def forward(module, inputs, output):
                check("the input of", name, inputs)
                check_weight(name or "lm_head")  # which is not called under --chunked-ce, so the model's own hook looks at it
                check("the output of", name, [output])

            def backward(module, into, out_of):
                check("the gradient at the output of", name, out_of)
                check("the gradient at the input of", name, into)
            module.register_forward_hook(forward)
            if name and not isinstance(module, torch.nn.Embedding):  # its input, token ids, has no gradient
                module.register_full_backward_hook(backward)
        for name, module in self.model.named_modules():
            add_hooks(name, module)


def linear_sizes(shape: GPTConfig) -> dict[str, tuple[int, int]]:
    """Name -> (inputs, outputs) of the linear layers of a model of this shape, named as in `GPT.linears`."""
    width, kv_dim, sizes = shape.n_embd, shape.n_kv_head * shape.head_dim, {}
    for i in range(shape.n_layer):
        attention = {"c_q": (width, width), "c_k": (width, kv_dim), "c_v": (width, kv_dim), "c_proj": (width, width)}
        if has_value_embedding(i, shape.n_layer):
            attention["ve_gate"] = VE_GATE_CHANNELS, shape.n_kv_head
        sizes |= {f"transformer.h.{i}.attn.{role}": size for role, size in attention.items()}
        sizes |= {f"transformer.h.{i}.mlp.c_fc": (width, 4 * width), f"transformer.h.{i}.mlp.c_proj": (4 * width, width)}
    return sizes | {"lm_head": (width, padded_vocab_size(shape.vocab_size))}


def exclusion_reasons(sizes: dict[str, tuple[int, int]], flags: Fp8Flags) -> dict[str, str | None]:
    """Name -> why a layer is not converted, or None, for layers of these (inputs, outputs)."""
    return {name: exclusion_reason(name, *size, flags) for name, size in sizes.items()}


def nothing_to_convert(excluded: dict[str, str | None]) -> str | None:
    """An error message if all layers are excluded, so that --fp8 would convert nothing; otherwise None."""
    if not all(excluded.values()):
        return None
    reasons = ", ".join(f"{count} because of {why}" for why, count in Counter(excluded.values()).most_common())
    return (f"--fp8 would convert none of the {len(excluded)} linear layers: excluded are {reasons}. "
            "Change what excludes them, or leave out --fp8")


def exclusion_reason(name: str, inputs: int, outputs: int, flags: Fp8Flags) -> str | None:
    """Why a layer is not converted, or None if it is. A layer's role is the last part of its name."""
    role = name.rpartition(".")[2]
    if inputs % MULTIPLE or outputs % MULTIPLE:
        return f"sizes that are not multiples of {MULTIPLE}"
    if min(inputs, outputs) < flags.fp8_min_dim:
        return f"--fp8-min-dim {flags.fp8_min_dim}"
    if flags.fp8_skip_lm_head and role == "lm_head":
        return "--fp8-skip-lm-head"
    if flags.fp8_skip_attn_qk and role in ("c_q", "c_k"):
        return "--fp8-skip-attn-qk"
    if flags.fp8_include_regex and not re.search(flags.fp8_include_regex, name):
        return f"--fp8-include-regex {flags.fp8_include_regex}"
    if flags.fp8_exclude_regex and re.search(flags.fp8_exclude_regex, name):
        return f"--fp8-exclude-regex {flags.fp8_exclude_regex}"


def fp8_flag_unavailable_reason(device_type: str, emulate: bool) -> str | None:
    """An error message if --fp8 is impossible on this device; None if it is possible, or if there is no such device, which is
    reported elsewhere."""
    import torch

    from nanochat.runtime.device import autodetect_device_type
    device_type = device_type or autodetect_device_type()
    if device_type == "mps":
        return "--fp8: torch has no FP8 dtypes on Apple GPUs. Leave it out, or add --device-type cpu --fp8-emulate"
    if emulate or (device_type == "cuda" and not torch.cuda.is_available()):
        return None
    from nanochat.fp8 import fp8_unavailable_reason
    index = int(os.environ.get("LOCAL_RANK", 0)) if device_type == "cuda" else None
    reason = fp8_unavailable_reason(torch.device(device_type, index))
    return reason and f"--fp8: {reason}. Leave it out, or add --fp8-emulate for the same numbers, slowly"


def convert(model, names: list[str], flags: Fp8Flags, device) -> None:
    """Replace the layers of these names by FP8 layers of the backend. A device without FP8 units multiplies in fp32."""
    from nanochat import fp8
    emulate = fp8.fp8_unavailable_reason(device) is not None
    if flags.fp8_backend == "custom":
        config = replace(fp8.Float8LinearConfig.from_recipe_name(flags.fp8_recipe), fast_accum=flags.fp8_fast_accum,
                         weight_grad_bf16=flags.fp8_weight_grad_bf16, cache_weights=True,
                         allow_in_graph=not flags.fp8_no_allow_in_graph, emulate=emulate)
        after_square = {name for name in names if name.endswith(".mlp.c_proj")}  # whose input is a squared ReLU
        for chosen, joins in ((set(names) - after_square, False), (after_square, True)):
            fp8.convert_to_float8_training(model, config=replace(config, joins_relu_square=joins),
                                           module_filter_fn=lambda layer, name, chosen=chosen: name in chosen)
        return
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.config import Float8GemmConfig
    config = replace(Float8LinearConfig.from_recipe_name(flags.fp8_recipe), emulate=emulate,
                     gemm_config_output=Float8GemmConfig(use_fast_accum=flags.fp8_fast_accum))
    convert_to_float8_training(model, config=config, module_filter_fn=lambda layer, name: name in names)


def layers_to_time(inputs: int, outputs: int, flags: Fp8Flags, device):
    """A bf16 layer and an FP8 layer of this size, as in training: the FP8 weights are already cast."""
    import torch

    from nanochat.fp8 import refresh_weights
    from nanochat.kernels.linear import Linear
    pair = torch.nn.ModuleDict({name: Linear(inputs, outputs) for name in ("bf16", "fp8")}).to(device)
    convert(pair, ["fp8"], flags, device)
    if flags.fp8_backend == "custom":
        refresh_weights([pair["fp8"]])
    return pair["bf16"], pair["fp8"]


def measure_shapes(shapes: list[tuple[int, int]], tokens: int, dtype, device, flags: Fp8Flags, compile: bool) -> dict:
    """(inputs, outputs) -> speed-up of FP8 over bf16 for forward and backward of a layer: a ratio of medians of ten, of a GPU's
    own time."""
    import torch

    from nanochat.runtime.timing import spread, time_in_turn
    gains = {}
    for inputs, outputs in shapes:
        torch._dynamo.reset()  # each shape is a graph of its own, and torch limits the graphs per function
        x = torch.randn(tokens, inputs, device=device, dtype=dtype, requires_grad=True)
        g = torch.randn(tokens, outputs, device=device, dtype=dtype)

        def call_of(layer, x=x, g=g):
            forward = torch.compile(layer, dynamic=False) if compile else layer
            return lambda: torch.autograd.grad(forward(x), (x, layer.weight), g)
        calls = dict(zip(("bf16", "fp8"), map(call_of, layers_to_time(inputs, outputs, flags, device)), strict=True))
        times = time_in_turn(calls, device, repeats=10, warmup=3, queued=True)
        gains[inputs, outputs] = spread(times["bf16"])["median"] / spread(times["fp8"])["median"]
        print0(f"FP8 for {inputs} -> {outputs} on {tokens} tokens: {gains[inputs, outputs]:.2f} times as fast as {dtype}")
    torch._dynamo.reset()
    return gains
