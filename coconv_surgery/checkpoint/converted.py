"""A converted network in one safetensors file: its weights together with its plan."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from coconv_surgery.checkpoint.tensors import can_hold, cannot_write, check_loadable, each_once, held_once, is_expanded
from coconv_surgery.layers.arguments import file_to_read, flag
from coconv_surgery.layers.files import whole_file
from coconv_surgery.layers.metadata import unchecked_levels
from coconv_surgery.layers.rollback import deep_restorer
from coconv_surgery.planning.notes import GUARD, guard_of, is_guarded
from coconv_surgery.planning.plan import Plan
from coconv_surgery.surgery import get_plan, switch_to_plan
from coconv_surgery.tracing.convertible import check_convertible
from coconv_surgery.tracing.finding import find_sites

# What the header holds besides the tensors, as JSON.
_PLAN = "coconv_plan"
_SHARED = "coconv_shared"  # names of tensors that are written under another name
_EXTRA = "coconv_extra_state"


def save_converted(model: nn.Module, path: str | Path, *, guard: bool = False) -> None:
    """Write a network's weights, with its plan as the file's metadata.

    A tensor that the network holds under several names is written once. The file is written whole: whatever goes wrong,
    the one that was there before stays.

    Args:
        model: A network, converted or not.
        path: The file, ``.safetensors`` by custom.
        guard: Whether to add the entry of :func:`guard`, so that no plain network loads the file strictly; the network
            does not get it.

    Raises:
        TypeError: If ``model`` is not a module, or ``path`` not a path.
        ValueError: If the network holds what a safetensors file has no place for; all of it is named.
        OSError: If it cannot be written.
    """
    plan, guard = get_plan(model), flag(guard, "guard")
    state: dict[str, Any] = {name: value for name, value in model.state_dict().items() if not name.startswith(GUARD)}
    tensors = {name: value.detach() for name, value in state.items() if isinstance(value, torch.Tensor)}
    extra = {name: value for name, value in state.items() if name not in tensors}
    problems = [f"{name} {why}" for name, tensor in tensors.items() if (why := cannot_write(tensor))]
    problems += [f"{name} is a {type(value).__name__}" for name, value in extra.items() if not _is_json(value)]
    if problems:
        raise ValueError(
            f"a safetensors file has no place for {'; '.join(problems)}: write the state dict with torch.save(), whose "
            "metadata tells the plan as well"
        )
    tensors, shared = each_once(tensors)
    if plan.converted and (guard or is_guarded(model)):
        tensors.update([guard_of(plan)])
    metadata = {_PLAN: plan.to_json(), _SHARED: json.dumps(shared), _EXTRA: json.dumps(extra)}
    metadata = {key: value for key, value in metadata.items() if value != "{}"}
    with whole_file(path, "path") as passing:
        try:
            save_file(tensors, passing, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error


def read_plan(path: str | Path) -> Plan:
    """Read the plan of a file that :func:`save_converted` wrote.

    Raises:
        TypeError: If it is not a path.
        ValueError: If it is not a safetensors file, or holds no plan.
        OSError: If it cannot be read.
    """
    header = _header(path)
    if _PLAN not in header:
        raise ValueError(f"{path} holds no plan: it was not written by save_converted()")
    return Plan.from_json(header[_PLAN])


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
    plan, header = read_plan(path), _header(path)
    weights: dict[str, Any] = load_file(str(path))
    check_loadable(model, weights, path)
    weights.update({alias: weights[name] for alias, name in json.loads(header.get(_SHARED, "{}")).items()})
    weights.update(json.loads(header.get(_EXTRA, "{}")))
    own = model.state_dict()
    weights, own = ({name: held[name] for name in held if not name.startswith(GUARD)} for held in (weights, own))
    both = [name for name in own.keys() & weights.keys() if isinstance(own[name], torch.Tensor)]
    problems = {
        "missing": own.keys() - weights.keys(),
        "unexpected": weights.keys() - own.keys(),
        "of another shape": [name for name in both if own[name].shape != weights[name].shape],
        "of which the network holds one for several that differ": [
            name for name in both if own[name].shape == weights[name].shape and not can_hold(own[name], weights[name])
        ],
    }
    if any(problems.values()):
        words = "; ".join(f"{len(names)} {kind}, as {min(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"the weights in {path} do not fit {type(model).__name__}: {words}")
    expanded = {name: (own[name], weights.pop(name)) for name in both if is_expanded(own[name])}
    with ExitStack() as undo:
        switch_to_plan(model, find_sites(model), plan, undo)
        undo.callback(deep_restorer(model))
        with unchecked_levels(), torch.no_grad():
            model.load_state_dict(weights, strict=False)
            for tensor, values in expanded.values():
                held_once(tensor, tensor).copy_(held_once(tensor, values))
        undo.pop_all()
    return model


def _header(path: str | Path) -> dict[str, str]:
    path = file_to_read(path, "path")
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


def _is_json(value: Any) -> bool:
    """Whether a value is the same after it has been JSON."""
    if isinstance(value, dict):
        return all(type(key) is str for key in value) and all(map(_is_json, value.values()))
    return all(map(_is_json, value)) if type(value) is list else type(value) in (str, int, float, bool, type(None))
