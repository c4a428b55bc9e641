"""The checkpoints of the CoConv authors (their repository, iduta/coconv), both ways.

Names are torchvision's, except that the 3×3 convolution of a block with several levels is stored level by level:
``layer1.0.conv2.conv2_1.weight``, ``layer1.0.conv2.conv2_2.weight`` and so on, to be concatenated in that order. Their
layer for networks of one's own, ``CoConv3x3_2d``, stores ``coconv_levels.0.weight`` and so on. All names may start with
DataParallel's ``module.``, and the tensors may be one entry, ``state_dict``, of what was saved.
"""

import pickle
import re
import struct
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError
from timm.models import load_state_dict

from coconv_surgery.checkpoint.tensors import check_loadable
from coconv_surgery.layers.arguments import file_to_read, instance
from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.levels import complete_levels
from coconv_surgery.layers.rollback import deep_restorer

_LEVEL_KEY = re.compile(
    r"(?P<conv>(?:.+\.)?conv2(?=\.conv2_)|.+(?=\.coconv_levels\.))"
    r"\.(?:conv2_|coconv_levels\.)(?P<level>\d+)\.(?P<kind>weight|bias)"
)
_NORM_ORDER = (
    "the checkpoint has the layout of the CoConv authors' release, whose CoResNet normalises after the addition at the "
    "end of every stage: build this one with norm_after_add=True, as 'coresnet50.iduta' is, or outputs will differ"
)


def merge_levels(state_dict: dict[str, Any], prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Join the authors' per-level tensors, in place.

    Args:
        state_dict: Tensors by name.
        prefix: Only names that start with this are considered.

    Returns:
        Output channels of each level, by the name of the convolution; empty if the layout is not the authors'.

    Raises:
        ValueError: If the levels of a convolution do not fit together; nothing is joined then.

    >>> state = {"conv2.conv2_2.weight": torch.zeros(2, 8, 3, 3), "conv2.conv2_1.weight": torch.zeros(4, 8, 3, 3)}
    >>> merge_levels(state), state["conv2.weight"].shape
    ({'conv2': (4, 2)}, torch.Size([6, 8, 3, 3]))
    """
    found: dict[tuple[str, str], dict[int, str]] = {}
    for key in state_dict:
        if key.startswith(prefix) and (match := _LEVEL_KEY.fullmatch(key)):
            found.setdefault((match["conv"], match["kind"]), {})[int(match["level"])] = key
    merged = {}
    splits = {}
    for (conv, kind), keys in found.items():
        tensors = [state_dict[keys[level]] for level in sorted(keys)]
        if max(keys) - min(keys) != len(keys) - 1 or min(keys) > 1:
            raise ValueError(f"{conv}: levels {sorted(keys)} are not all there")
        if f"{conv}.{kind}" in state_dict:
            raise ValueError(f"{conv}: there is a {kind} for each level and one for all of them")
        if any(tensor.dim() == 0 or tensor.shape[1:] != tensors[0].shape[1:] for tensor in tensors):
            raise ValueError(f"{conv}: the levels' shapes do not fit together: {[tuple(t.shape) for t in tensors]}")
        merged[f"{conv}.{kind}"] = torch.cat(tensors)
        splits[conv] = tuple(tensor.shape[0] for tensor in tensors)
    for keys in found.values():
        for key in keys.values():
            del state_dict[key]
    state_dict.update(merged)
    return splits


def warn_of_norm_order(model: nn.Module) -> None:
    """Warn if a network does not normalise after the addition, as those that the authors trained do."""
    if not getattr(model, "norm_after_add", False):
        warnings.warn(_NORM_ORDER, stacklevel=3)


def is_authors_checkpoint(path: str | Path) -> bool:
    """Whether a checkpoint has a convolution stored level by level.

    Raises:
        ValueError: If the safe loader cannot read it.
        OSError: If it cannot be opened.
    """
    if file_to_read(path, "path").suffix in (".npz", ".npy"):  # which timm reads for networks of JAX
        return False
    return any(_LEVEL_KEY.fullmatch(str(name)) for name in _read(path))


def load_authors_checkpoint(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a checkpoint of the CoConv authors.

    The file is read by torch's safe loader: no code in it is executed. Everything is checked before the first weight
    changes; whatever goes wrong then, interrupts included, all weights are put back.

    Args:
        model: The network, such as ``timm.create_model("coresnet50.iduta")``.
        path: Their file.

    Returns:
        The same model object.

    Raises:
        TypeError: If ``model`` is not a module, or ``path`` not a path.
        ValueError: If it is not a complete checkpoint, is not in the authors' layout, or does not fit the network: all
            that does not is named, and the network is left as it was.
        OSError: If it cannot be opened.

    Warns:
        UserWarning: If the network does not normalise after the addition, as theirs do.
    """
    instance(model, "model", nn.Module, "a torch.nn.Module")
    state = _read(path)
    _check_tensors(state, path)
    check_loadable(model, state, path)
    try:
        splits = merge_levels(state)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not splits:
        raise ValueError(
            f"{path} is not in the CoConv authors' layout, no convolution is stored level by level: "
            "load it as an ordinary checkpoint, with timm.models.load_checkpoint()"
        )
    own = model.state_dict()
    problems = {
        "missing in the file": _summed_up(own.keys() - state.keys(), state),
        "unexpected in the file": _summed_up(state.keys() - own.keys(), own),
        "of another shape": [
            f"{name} ({_shape(state[name])} in the file, {_shape(own[name])} in the network)"
            for name in own
            if name in state and own[name].shape != state[name].shape
        ],
        "with other levels": list(_other_levels(model, splits)),
    }
    lines = [f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names]
    if lines:
        raise ValueError(f"{path} does not fit {type(model).__name__}, which is left as it was:\n" + "\n".join(lines))
    warn_of_norm_order(model)
    with ExitStack() as undo:
        undo.callback(deep_restorer(model))
        model.load_state_dict(state)
        undo.pop_all()
    return model


def export_authors_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """A network's weights in the layout of the CoConv authors, for their code.

    Args:
        model: A CoResNet that normalises after the addition, such as ``timm.create_model("coresnet50.iduta")``.

    Returns:
        Tensors by their names; ``torch.save`` writes what :func:`load_authors_checkpoint` reads.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If their network would compute something else, or has no place for a convolution's levels.
    """
    if not getattr(instance(model, "model", nn.Module, "a torch.nn.Module"), "norm_after_add", False):
        raise ValueError(
            f"{type(model).__name__} does not normalise after the addition at the end of every stage, so the authors' "
            "network would compute something else with its weights: train 'coresnet50.iduta' for it"
        )
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, conv in model.named_modules():
        if not isinstance(conv, CoConv2d):
            continue
        if not name.endswith(".conv2") or (conv.dilations, conv.splits) != complete_levels(conv, conv.levels):
            raise ValueError(
                f"{name} has dilations {conv.dilations} with {conv.splits} channels, which the authors' layout has no "
                "place for"
            )
        levels = state.pop(f"{name}.weight").split(conv.splits)
        state.update({f"{name}.conv2_{level}.weight": weight.clone() for level, weight in enumerate(levels, start=1)})
    return state


# What the loaders raise on a file that is damaged or refused.
_UNREADABLE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError),
    *(pickle.UnpicklingError, struct.error, SafetensorError),
)


def _read(path: str | Path) -> dict[str, Any]:
    file_to_read(path, "path").open("rb").close()  # a file that cannot be opened is not a damaged one
    try:
        state = load_state_dict(str(path), use_ema=False, weights_only=True)
    except _UNREADABLE as error:
        if code := re.search(r"GLOBAL ([\w.]+)", str(error.__cause__ or error)):
            problem = f"holds more than tensors ({code[1]}), and the safe loader does not execute that"
        else:
            problem = "is not a complete checkpoint"
        raise ValueError(f"{path} {problem}") from error
    return dict(state)


def _check_tensors(state: Mapping[Any, Any], path: str | Path) -> None:
    if not state:
        raise ValueError(f"{path} holds no tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path} holds a {type(value).__name__} under {name!r}, not a tensor by name")


def _other_levels(model: nn.Module, found: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        own = module.splits if isinstance(module, CoConv2d) else (module.out_channels,)
        stored = found.get(name, (module.out_channels,))
        if own != stored and sum(stored) == module.out_channels:
            yield f"{name} ({stored} in the file, {own} in the network)"


def _summed_up(names: Iterable[str], others: Collection[str]) -> list[str]:
    """Names, a whole module as ``module.*`` where the other side has nothing of it."""
    inner = {prefix for name in others for prefix in _prefixes(name)}
    summed = (next((f"{prefix}.*" for prefix in _prefixes(name) if prefix not in inner), name) for name in names)
    return sorted(
        dict.fromkeys(summed), key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]
    )


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _shape(tensor: torch.Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"
