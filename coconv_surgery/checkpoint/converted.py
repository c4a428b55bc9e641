"""A converted network on disk: its weights together with its plan, in one safetensors file."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_model

from coconv_surgery.layers.arguments import file_to_read, file_to_write
from coconv_surgery.layers.rollback import deep_restorer
from coconv_surgery.planning.plan import Plan
from coconv_surgery.surgery import get_plan, switch_to_plan
from coconv_surgery.tracing.convertible import check_convertible, check_unsharded, path_of
from coconv_surgery.tracing.finding import find_intact_sites

_KEY = "coconv_plan"


def save_converted(model: nn.Module, path: str | Path) -> None:
    """Write a network's weights, with its plan as the file's metadata.

    Args:
        model: A network, converted or not.
        path: The file, ``.safetensors`` by custom.

    Raises:
        TypeError: If ``model`` is not a module, or one whose weights are sharded, or ``path`` is not a path.
        ValueError: If a contextual convolution was pruned.
        OSError: If it cannot be written.
    """
    plan, path = get_plan(model), file_to_write(path, "path")
    for name, module in model.named_modules():
        check_unsharded(module, path_of(name), "load the gathered weights into a whole network, and save that")
    try:
        save_model(model, str(path), metadata={_KEY: plan.to_json()})
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def read_plan(path: str | Path) -> Plan:
    """Read the plan of a file that :func:`save_converted` wrote.

    Raises:
        TypeError: If it is not a path.
        ValueError: If it is not a safetensors file, or holds no plan.
        OSError: If it cannot be read.
    """
    path = file_to_read(path, "path")
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
        TypeError: If ``model`` is not a module that can be converted in place, or ``path`` not a path.
        ValueError: If the file holds no plan, or plan or weights do not fit. Whatever goes wrong, interrupts included,
            the network is left as it was; to that end its weights are kept in memory a second time meanwhile.
        OSError: If the file cannot be read.
    """
    check_convertible(model)
    plan, weights, own = read_plan(path), load_file(str(path)), model.state_dict()
    check_loadable(model, weights, path)
    stored = {own[name].data_ptr() for name in own.keys() & weights.keys()}
    # A tensor that the network holds under several names is written once.
    missing = [name for name in own if name not in weights and own[name].data_ptr() not in stored]
    unexpected = [name for name in weights if name not in own]
    reshaped = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    if any(problems.values()):
        words = "; ".join(f"{len(names)} {kind}, as {min(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"the weights in {path} do not fit {type(model).__name__}: {words}")
    with ExitStack() as undo:
        switch_to_plan(model, find_intact_sites(model), plan, undo)
        undo.callback(deep_restorer(model))
        model.load_state_dict(weights, strict=False)
        undo.pop_all()
    return model


def check_loadable(model: nn.Module, weights: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Check that tensors can be copied into those that a network has under the same names.

    Args:
        model: The network.
        weights: Tensors by name.
        path: Where they come from, for the message.

    Raises:
        ValueError: If the network has no memory for them, or one is not an ordinary tensor of numbers.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError(
            f"{type(model).__name__} is on the meta device, where weights have no place: build it on another"
        )
    for name, tensor in weights.items():
        kind = None
        if tensor.is_meta:
            kind = "has a shape but no numbers"
        elif tensor.is_nested:
            kind = "is nested"
        elif tensor.is_quantized or tensor.layout is not torch.strided:
            kind = "is quantised" if tensor.is_quantized else f"has the layout {tensor.layout}"
        elif tensor.is_complex() and not (name in own and own[name].is_complex()):
            kind = f"is of type {tensor.dtype}, which would lose its imaginary part"
        if kind is not None:
            raise ValueError(f"{path}: {name} {kind}; it must be an ordinary tensor")
