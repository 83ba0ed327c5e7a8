"""The states of all random number generators of a process, as JSON: torch's on the host and the device, Python's, numpy's.

Training itself draws no random numbers after initialization: a batch is a function of (seed, step, rank). Features may draw
some; after a resume they must draw those that would have come next.
"""

import base64
import random

import numpy as np
import torch


def rng_state(device: torch.device) -> dict:
    """State of every generator of this process; the device's is that of `device` alone."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    state = {"torch": _text(torch.get_rng_state().numpy()),
             "python": {"version": version, "words": _text(np.array(words, np.uint32)), "gauss": gauss},
             "numpy": numpy_state | {"state": {"key": _text(numpy_state["state"]["key"]), "pos": numpy_state["state"]["pos"]}}}
    if device.type in ("cuda", "mps"):
        backend = torch.cuda if device.type == "cuda" else torch.mps
        state[device.type] = _text(backend.get_rng_state().numpy())
    return state


def set_rng_state(state: dict, device: torch.device) -> None:
    """Take over what `rng_state` gave. A generator that the state does not know (another kind of device) stays as it is."""
    torch.set_rng_state(_tensor(state["torch"]))
    python, numpy_state = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(_words(python["words"]).tolist()), python["gauss"]))
    np.random.set_state(numpy_state | {"state": numpy_state["state"] | {"key": _words(numpy_state["state"]["key"])}})
    if device.type in state:
        (torch.cuda if device.type == "cuda" else torch.mps).set_rng_state(_tensor(state[device.type]))


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _words(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint32)


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
