"""What the server of processes.py has loaded before it forks: all that a run on a CPU loads, and what torch finds out about the
compiler by starting six processes."""

import gc
from importlib import import_module

for name in ("nanochat.training.loop", "functorch.compile", "torch._dynamo.repro.after_dynamo", "torch._inductor.codecache",
             "torch._inductor.cpu_vec_isa", "torch.utils.cpp_extension"):
    import_module(name)
import_module("torch._inductor.cpu_vec_isa").pick_vec_isa()
gc.freeze()  # what is loaded outlives every run: each would search all of it for garbage
