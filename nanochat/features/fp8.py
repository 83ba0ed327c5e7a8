"""FP8 training: linear layers multiply eight-bit operands (nanochat/fp8.py), everything else stays as it was.

Layers are chosen by name and size before anything is compiled. Each shares its weight with the layer it replaces, and
that one takes its place again while the model is evaluated, sampled from and saved: outside of training there is no FP8,
and checkpoints know nothing of it. FLOPs, and what follows from them, are counted from the shape and so do not change.
"""

import importlib.util
import math
import os
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

from nanochat.cli.flags import flag, flag_name
from nanochat.common import Diverged, UserError, format_table, print0
from nanochat.features.base import Feature
from nanochat.recipe.shape import VE_GATE_CHANNELS, GPTConfig, has_value_embedding, padded_vocab_size

MULTIPLE = 16  # as in nanochat/fp8.py, which loads torch: of which every dimension of an FP8 product must be a multiple
LARGEST_VOCABULARY = 2**24
PAYS_FROM = 1.02  # speed-up over bf16 from which --fp8-policy auto converts a shape: what timing noise may fake, and a bit


@dataclass
class Fp8Flags:
    """FP8 training"""
    fp8: bool = flag(False, "train the linear layers in FP8")
    fp8_emulate: bool = flag(False, "allow --fp8 on a device without FP8 units: the same numbers, slowly", free=True)
    fp8_backend: str = flag("custom", "whose layers: nanochat/fp8.py's, or torchao's", choices=("custom", "torchao"))
    fp8_recipe: str = flag("tensorwise", "a scale per tensor, or per row (torchao)", choices=("tensorwise", "rowwise"))
    fp8_policy: str = flag("all", "of the layers that the flags below leave: convert all, or (auto) those of a shape "
                                  "that is faster in FP8 when measured on this device", choices=("all", "auto"))
    fp8_min_dim: int = flag(128, "leave out layers with fewer inputs or outputs", low=1)
    fp8_skip_lm_head: bool = flag(False, "leave out the head")
    fp8_skip_attn_qk: bool = flag(False, "leave out the projections to queries and keys")
    fp8_include_regex: str | None = flag(None, "only layers in whose name this is found", metavar="REGEX")
    fp8_exclude_regex: str | None = flag(None, "leave out layers in whose name this is found", metavar="REGEX")
    fp8_fast_accum: bool = flag(False, "add up the forward products with fewer bits, which is faster on Hopper")
    fp8_weight_grad_bf16: bool = flag(False, "weight gradients of a micro-batch in bf16, not fp32 (torchao's always are)")
    fp8_no_allow_in_graph: bool = flag(False, "let torch.compile's front end trace into the FP8 layers", free=True)
    fp8_log_modules: bool = flag(False, "list every linear layer, and why it is not converted", free=True)
    fp8_debug: bool = flag(False, "check every activation, gradient and scale: name the first module with a NaN or infinity",
                           free=True)


class Fp8(Feature):
    name = "fp8"
    Config = Fp8Flags

    @classmethod
    def enabled(cls, config) -> bool:
        return config.features[cls.name].fp8

    @classmethod
    def validate(cls, config) -> list[str]:
        flags, device_type = config.features[cls.name], config.run.device_type
        given = [flag_name(f.name) for f in fields(flags) if getattr(flags, f.name) != f.default]
        if not flags.fp8:
            return [f"{', '.join(given)} without --fp8 would do nothing: add it"] if given else []
        problems = []
        for name, pattern in (("include", flags.fp8_include_regex), ("exclude", flags.fp8_exclude_regex)):
            try:
                re.compile(pattern or "")
            except re.error as e:
                problems.append(f"--fp8-{name}-regex {pattern!r} is no regular expression: {e}")
        if flags.fp8_backend == "custom" and flags.fp8_recipe != "tensorwise":
            problems.append(f"--fp8-recipe {flags.fp8_recipe} is torchao's: add --fp8-backend torchao, or take tensorwise")
        if flags.fp8_backend == "torchao":
            problems += [f"{name} is the custom backend's: leave it out, or --fp8-backend torchao"
                         for name in ("--fp8-weight-grad-bf16", "--fp8-no-allow-in-graph") if name in given]
            if not importlib.util.find_spec("torchao"):
                problems.append("--fp8-backend torchao needs that package: pip install torchao, or take --fp8-backend custom")
        if flags.fp8_debug and config.run.compile:
            problems.append("--fp8-debug looks into every module while it runs: add --no-compile")
        rows = config.horizon.device_batch_size * config.model.max_seq_len
        if rows % MULTIPLE:
            problems.append(f"FP8 products need tokens in multiples of {MULTIPLE}, and a micro-batch has {rows}: "
                            "choose another --device-batch-size or --max-seq-len")
        if not problems:
            # the tokenizer is not known yet, and with the largest vocabulary the head is as wide as it can be
            left_out = left_out_of(linear_sizes(config.model.shape(LARGEST_VOCABULARY)), flags)
            trouble = nothing_to_convert(left_out) or device_trouble(device_type, flags.fp8_emulate)
            problems += [trouble] if trouble else []
        return problems

    def __init__(self, config):
        super().__init__(config)
        self.tokens = config.horizon.device_batch_size * config.model.max_seq_len  # of a micro-batch
        self.compile = config.run.compile
        self.plain, self.fp8 = {}, {}  # the layers converted by name: as they were, and what took their place
        self.checked = 0               # tensors that --fp8-debug found finite

    def on_model(self, model, horizon) -> None:
        flags, layers = self.config, model.linears()
        left_out = left_out_of({name: (layer.in_features, layer.out_features) for name, layer in layers.items()}, flags)
        if trouble := nothing_to_convert(left_out):
            raise UserError(trouble)
        if flags.fp8_policy == "auto":
            shapes = {(layers[name].in_features, layers[name].out_features) for name, why in left_out.items() if not why}
            from nanochat.runtime.distributed import broadcast_object
            gains = broadcast_object(measure_shapes(sorted(shapes), self.tokens, model.compute_dtype, model.get_device(),
                                                    flags, self.compile))
            for name, why in left_out.items():
                gain = gains.get((layers[name].in_features, layers[name].out_features), math.inf)
                if not why and gain < PAYS_FROM:
                    left_out[name] = f"{gain:.2f} times as fast as bf16"
        self.model, self.linears = model, len(layers)
        self._convert([name for name, why in left_out.items() if not why])
        if flags.fp8_log_modules:
            print0(format_table([{"layer": name, "inputs": layer.in_features, "outputs": layer.out_features,
                                  "FP8": f"no: {why}" if (why := left_out[name]) else "yes"} for name, layer in layers.items()]))
        converted = len(self.fp8)
        print0(f"Converted FP8 layers: {converted}/{len(layers)} ({converted / len(layers):.2%})")
        if not converted:
            print0("--fp8-policy auto: no layer is faster in FP8 on this device, so this run trains as without --fp8")

    def _convert(self, names: list[str]) -> None:
        """Convert the layers of these names, and no others."""
        for name, layer in self.plain.items():
            self.model.set_submodule(name, layer)
        self.plain = {name: self.model.get_submodule(name) for name in names}
        convert(self.model, names, self.config, self.model.get_device())
        self.fp8 = {name: self.model.get_submodule(name) for name in names}
        self.after_update()
        if self.config.fp8_debug:
            self._watch()

    def after_update(self) -> None:
        from nanochat.fp8 import refresh_weights
        if self.config.fp8_backend == "custom":
            refresh_weights(self.fp8.values())

    @contextmanager
    def eval_context(self, model):
        for name, layer in self.plain.items():
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
        """A resumed run goes on with the layers it measured at first; without the policy `auto` the flags decide."""
        if self.config.fp8_policy == "auto" and state["layers"] != list(self.fp8):
            self._convert(state["layers"])
            print0(f"as before the resume, {len(self.fp8)} layers are in FP8")

    def report(self) -> str | None:
        return f"--fp8-debug: {self.checked:,} activations, gradients and scales checked" if self.config.fp8_debug else None

    def _watch(self) -> None:
        """Check what enters and leaves each module, and what flows back through it. Inner modules come first."""
        import torch

        def check(what: str, name: str, tensors) -> None:
            for tensor in tensors:
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    self.checked += 1
                    bad = tensor.numel() - int(tensor.isfinite().sum())
                    if bad:
                        raise Diverged(f"{what} {name or 'the model'} has {bad} NaN or infinite elements of {tensor.numel()}")

        def watch(name, module):
            def forward(module, inputs, output):
                check("the input of", name, inputs)
                if name in self.fp8:
                    check("the weight of", name, [module.weight])
                    check("the weight's scale of", name, [b for b in module.buffers() if b.dim() == 0])
                check("the output of", name, [output])

            def backward(module, into, out_of):
                check("the gradient at the output of", name, out_of)
                check("the gradient at the input of", name, into)
            module.register_forward_hook(forward)
            if name and not isinstance(module, torch.nn.Embedding):  # those take token ids, to which nothing flows back
                module.register_full_backward_hook(backward)
        for name, module in self.model.named_modules():
            watch(name, module)


def linear_sizes(shape: GPTConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear layers of a model of this shape, by name, as its `linears` has them."""
    width, kv_dim, sizes = shape.n_embd, shape.n_kv_head * shape.head_dim, {}
    for i in range(shape.n_layer):
        attention = {"c_q": (width, width), "c_k": (width, kv_dim), "c_v": (width, kv_dim), "c_proj": (width, width)}
        if has_value_embedding(i, shape.n_layer):
            attention["ve_gate"] = VE_GATE_CHANNELS, shape.n_kv_head
        sizes |= {f"transformer.h.{i}.attn.{role}": size for role, size in attention.items()}
        sizes |= {f"transformer.h.{i}.mlp.c_fc": (width, 4 * width), f"transformer.h.{i}.mlp.c_proj": (4 * width, width)}
    return sizes | {"lm_head": (width, padded_vocab_size(shape.vocab_size))}


def left_out_of(sizes: dict[str, tuple[int, int]], flags: Fp8Flags) -> dict[str, str | None]:
    """For each layer, of (inputs, outputs), why it is not converted; None where it is."""
    return {name: reason_to_leave_out(name, *size, flags) for name, size in sizes.items()}


def nothing_to_convert(left_out: dict[str, str | None]) -> str | None:
    """Why --fp8 with these layers left out would be no FP8 at all; None where some are converted."""
    if not all(left_out.values()):
        return None
    reasons = ", ".join(f"{count} for {why}" for why, count in Counter(left_out.values()).most_common())
    return (f"--fp8 would convert none of the {len(left_out)} linear layers: left out are {reasons}. "
            "Change what leaves them out, or leave out --fp8")


def reason_to_leave_out(name: str, inputs: int, outputs: int, flags: Fp8Flags) -> str | None:
    """Why a layer is not converted, in words; None where it is. A layer's role is the last part of its name."""
    role = name.rpartition(".")[2]
    if inputs % MULTIPLE or outputs % MULTIPLE:
        return f"sizes that are no multiples of {MULTIPLE}"
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


def device_trouble(device_type: str, emulate: bool) -> str | None:
    """Why --fp8 cannot be had on a device; None where it can, and where there is no such device, which others say."""
    import torch

    from nanochat.runtime.device import autodetect_device_type
    device_type = device_type or autodetect_device_type()
    if device_type == "mps":
        return "--fp8: on Apple GPUs torch has no FP8 numbers at all. Leave it out, or add --device-type cpu --fp8-emulate"
    if emulate or (device_type == "cuda" and not torch.cuda.is_available()):
        return None
    from nanochat.fp8 import fp8_trouble
    trouble = fp8_trouble(torch.device(device_type, int(os.environ.get("LOCAL_RANK", 0)) if device_type == "cuda" else None))
    return trouble and f"--fp8: {trouble}. Leave it out, or add --fp8-emulate for the same numbers, slowly"


def convert(model, names: list[str], flags: Fp8Flags, device) -> None:
    """Replace the layers of these names by the FP8 layers of the backend. A GPU without FP8 units multiplies in fp32."""
    from nanochat import fp8
    emulate = device.type == "cuda" and fp8.fp8_trouble(device) is not None
    if flags.fp8_backend == "custom":
        config = replace(fp8.Float8LinearConfig.from_recipe_name(flags.fp8_recipe), fast_accum=flags.fp8_fast_accum,
                         weight_grad_bf16=flags.fp8_weight_grad_bf16, cache_weights=True,
                         allow_in_graph=not flags.fp8_no_allow_in_graph, emulate=emulate)
        convert_layers = fp8.convert_to_float8_training
    else:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training as convert_layers
        from torchao.float8.config import Float8GemmConfig
        config = replace(Float8LinearConfig.from_recipe_name(flags.fp8_recipe), emulate=emulate,
                         gemm_config_output=Float8GemmConfig(use_fast_accum=flags.fp8_fast_accum))
    convert_layers(model, config=config, module_filter_fn=lambda layer, name: name in names)


def layers_to_time(inputs: int, outputs: int, flags: Fp8Flags, device):
    """A bf16 layer and an FP8 one of this size, as they are trained: the FP8 weights already cast."""
    import torch

    from nanochat.fp8 import refresh_weights
    from nanochat.kernels.linear import Linear
    pair = torch.nn.ModuleDict({name: Linear(inputs, outputs) for name in ("bf16", "fp8")}).to(device)
    convert(pair, ["fp8"], flags, device)
    if flags.fp8_backend == "custom":
        refresh_weights([pair["fp8"]])
    return pair["bf16"], pair["fp8"]


def measure_shapes(shapes: list[tuple[int, int]], tokens: int, dtype, device, flags: Fp8Flags, compile: bool) -> dict:
    """How many times as fast as bf16 forward and backward of a layer are in FP8, by (inputs, outputs), medians of ten."""
    import torch

    from nanochat.runtime.timing import spread, time_in_turn
    gains = {}
    for inputs, outputs in shapes:
        torch._dynamo.reset()  # every shape is a graph, of which a function may have only so many
        x = torch.randn(tokens, inputs, device=device, dtype=dtype, requires_grad=True)
        g = torch.randn(tokens, outputs, device=device, dtype=dtype)

        def call_of(layer, x=x, g=g):
            forward = torch.compile(layer, dynamic=False) if compile else layer
            return lambda: torch.autograd.grad(forward(x), (x, layer.weight), g)
        calls = dict(zip(("bf16", "fp8"), map(call_of, layers_to_time(inputs, outputs, flags, device)), strict=True))
        times = time_in_turn(calls, device, repeats=10, warmup=3)
        gains[inputs, outputs] = spread(times["bf16"])["median"] / spread(times["fp8"])["median"]
        print0(f"FP8 for {inputs} -> {outputs} on {tokens} tokens: {gains[inputs, outputs]:.2f} times as fast as {dtype}")
    torch._dynamo.reset()
    return gains
