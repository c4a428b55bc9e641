"""A converted network on disk: its weights together with its plan, in one safetensors file."""

from pathlib import Path

import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_model

from coconv_surgery.planning.plan import Plan
from coconv_surgery.surgery import apply_plan, get_plan

_KEY = "coconv_plan"


def save_converted(model: nn.Module, path: str | Path) -> None:
    """Write a network's weights, with its plan as the file's metadata.

    Args:
        model: A network, converted or not.
        path: The file, ``.safetensors`` by custom.

    Raises:
        OSError: If it cannot be written.
    """
    try:
        save_model(model, str(path), metadata={_KEY: get_plan(model).to_json()})
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def read_plan(path: str | Path) -> Plan:
    """Read the plan of a file that :func:`save_converted` wrote.

    Raises:
        ValueError: If it is no safetensors file, or holds no plan.
        OSError: If it cannot be read.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    if _KEY not in metadata:
        raise ValueError(f"{path} holds no plan: it was not written by save_converted()")
    return Plan.from_json(metadata[_KEY])


def load_converted(model: nn.Module, path: str | Path) -> nn.Module:
    """Convert a fresh network as a saved one was, and load its weights.

    Args:
        model: A network of the same architecture, plain or converted.
        path: A file that :func:`save_converted` wrote.

    Returns:
        The same model object.

    Raises:
        ValueError: If the file holds no plan, or plan or weights do not fit; the network is left as it was.
        OSError: If the file cannot be read.
    """
    plan = read_plan(path)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError(
            f"{type(model).__name__} is on the meta device, where weights have no place: build it on another"
        )
    weights = load_file(str(path))
    own = model.state_dict()
    stored = {own[name].data_ptr() for name in own.keys() & weights.keys()}
    # A tensor that the network holds under several names is written once.
    missing = [name for name in own if name not in weights and own[name].data_ptr() not in stored]
    unexpected = [name for name in weights if name not in own]
    reshaped = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    if any(problems.values()):
        words = "; ".join(f"{len(names)} {kind}, as {min(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"the weights in {path} do not fit {type(model).__name__}: {words}")
    if get_plan(model).diff(plan):
        apply_plan(model, plan)
    model.load_state_dict(weights, strict=False)
    return model
