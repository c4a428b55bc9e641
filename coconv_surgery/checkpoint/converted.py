"""A converted network and the file of its weights."""

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import save_file

from coconv_surgery.checkpoint.header import (
    beside_tensors,
    check_network,
    is_json,
    read_header,
    versions_in_header,
    write_header,
)
from coconv_surgery.checkpoint.origin import plan_told
from coconv_surgery.checkpoint.reading import is_safetensors, read_checkpoint, weights_in
from coconv_surgery.checkpoint.tensors import cannot_write, check_fit, check_loadable, each_once, held_once
from coconv_surgery.layers.arguments import file_to_write, flag
from coconv_surgery.layers.files import whole_file
from coconv_surgery.layers.metadata import unchecked_levels
from coconv_surgery.layers.rollback import deep_restorer
from coconv_surgery.planning.notes import GUARD, guard_of, is_guard, is_guarded
from coconv_surgery.planning.plan import Plan
from coconv_surgery.surgery import complete_plan, get_plan, switch_to_plan
from coconv_surgery.tracing.convertible import check_convertible, check_unsharded, path_of
from coconv_surgery.tracing.finding import find_intact_sites
from coconv_surgery.tracing.objects import is_expanded
from coconv_surgery.tracing.switching import mark_calibrated

# Suffixes of other formats, by which their readers would take the file for one.
_OF_OTHERS = {
    ".bin",
    ".ckpt",
    ".h5",
    ".json",
    ".npz",
    ".onnx",
    ".pickle",
    ".pkl",
    ".pt",
    ".pt2",
    ".pth",
    ".py",
    ".tar",
    ".xml",
}


def save_converted(
    model: nn.Module, path: str | Path, *, guard: bool = False, network: Mapping[str, Any] | None = None
) -> None:
    """Write a network's weights, with its plan as the file's metadata.

    A tensor that the network holds under several names is written once. The file is written whole: whatever goes wrong,
    the one that was there before stays.

    Args:
        model: A network, converted or not.
        path: The file, ``.safetensors`` by custom; not of a suffix that says another format, such as ``.pth``.
        guard: Whether to add the entry of :func:`guard`, so that no plain network loads the file strictly; the network
            does not get it.
        network: What the network is, so that ``coconv`` takes the file for it: the ``target`` that the command line
            would take, such as timm's name of it, and the ``arguments`` that it is built with.

    Raises:
        TypeError: If ``model`` is not a module, or one whose weights are sharded, or ``path`` is not a path, or
            ``network`` not a dict of that.
        ValueError: If ``path`` has the suffix of another format, a contextual convolution was pruned, or the network
            holds what a safetensors file has no place for; all of it is named.
        OSError: If it cannot be written.
    """
    plan, guard, path = get_plan(model), flag(guard, "guard"), file_of_weights(path)
    network = None if network is None else check_network(network, "network")
    for name, module in model.named_modules():
        check_unsharded(module, path_of(name), "load the gathered weights into a whole network, and save that")
    whole = model.state_dict()
    state: dict[str, Any] = {name: value for name, value in whole.items() if not name.startswith(GUARD)}
    tensors = {name: value.detach() for name, value in state.items() if isinstance(value, torch.Tensor)}
    extra = {name: value for name, value in state.items() if name not in tensors}
    problems = [f"{name} {why}" for name, tensor in tensors.items() if (why := cannot_write(tensor))]
    problems += [f"{name} is a {type(value).__name__}" for name, value in extra.items() if not is_json(value)]
    if problems:
        raise ValueError(
            f"a safetensors file has no place for {'; '.join(problems)}: write the state dict with torch.save(), whose "
            "metadata tells the plan as well"
        )
    tensors, shared = each_once(tensors)
    if plan.converted and (guard or is_guarded(model)):
        tensors.update([guard_of(plan)])
    with whole_file(path, "path") as passing:
        try:
            save_file(tensors, passing, metadata=write_header(plan, shared, extra, network, _versions(model, whole)))
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error


def load_converted(model: nn.Module, path: str | Path) -> nn.Module:
    """Convert a fresh network as a saved one was, and load its weights.

    Args:
        model: A network of the same architecture, plain or converted.
        path: A file that :func:`save_converted` wrote, or any other that tells its plan, see :func:`plan_of`: a state
            dict that ``torch.save`` wrote, a checkpoint of mmengine or Lightning. No code in it is executed. Where a
            training script kept an average of the weights beside them, under a name that timm knows, that is loaded,
            as timm does; under other names, what fits the network best. What is put before
            all names, as by data parallelism, ``torch.compile``, ``AveragedModel`` or Lightning, is taken off where the
            rest are the network's.

    Returns:
        The same model object.

    Raises:
        TypeError: If ``model`` is not a module that can be converted in place, or ``path`` not a path.
        CheckpointError: If it is not a complete file of that kind, or tells no plan.
        ValueError: If plan or weights do not fit. Whatever goes wrong, interrupts included, the network is left as it
            was; to that end its weights are kept in memory a second time meanwhile.
        OSError: If the file cannot be read.
    """
    check_convertible(model)
    own = _unguarded(model.state_dict())
    plan, weights = _plan_and_weights(path, own)
    check_loadable(model, weights, path)
    check_fit(model, own, weights, path)
    both = [name for name in own if isinstance(own[name], torch.Tensor)]
    expanded = {name: (own[name], weights.pop(name)) for name in both if is_expanded(own[name])}
    with ExitStack() as undo:
        switch_to_plan(model, find_intact_sites(model), complete_plan(model, plan), undo)
        undo.callback(deep_restorer(model))
        with unchecked_levels(), torch.no_grad():
            model.load_state_dict(weights, strict=False)
            for tensor, values in expanded.values():
                held_once(tensor, tensor).copy_(held_once(tensor, values))
        mark_calibrated(find_intact_sites(model), plan.calibrated, undo, stale=plan.stale)
        undo.pop_all()
    return model


def file_of_weights(path: str | Path) -> Path:
    """The path that :func:`save_converted` may write to, with its errors of paths."""
    file = file_to_write(path, "path")
    if file.suffix.lower() in _OF_OTHERS:
        raise ValueError(
            f"path: {file} would be a safetensors file, whatever its name: call it "
            f"{file.with_suffix('.safetensors').name}"
        )
    return file


def check_sizes(model: nn.Module, path: str | Path) -> None:
    """Check that the weights of a converted network fit another, which may be on the meta device.

    Args:
        model: The network.
        path: As of :func:`load_converted`, with the same errors.
    """
    own = _unguarded(model.state_dict())
    _, weights = _plan_and_weights(path, own)
    check_fit(model, own, weights, path)


def _plan_and_weights(path: str | Path, own: Mapping[str, Any]) -> tuple[Plan, dict[str, Any]]:
    """What a file holds, by the names of a network's own weights."""
    content: Any = read_checkpoint(path)
    if is_safetensors(path):
        header = read_header(path)
        content = OrderedDict(content | beside_tensors(header, content, path))
        versions = versions_in_header(header, path)
        content._metadata = {name: {"version": version} for name, version in versions.items()}
    weights = weights_in(content, path, own)
    for name in filter(is_guard, [*weights]):
        del weights[name]
    return plan_told(content, path, own), weights


def _versions(model: nn.Module, state: Any) -> dict[str, int]:
    """The versions that torch notes of modules in a state dict, but of its own, which know what to do without."""
    own = {name for name, module in model.named_modules() if not type(module).__module__.startswith("torch.nn.")}
    noted = {name: part.get("version") for name, part in getattr(state, "_metadata", {}).items() if name in own}
    return {name: version for name, version in noted.items() if type(version) is int and version != 1}


def _unguarded(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not is_guard(name)}
