"""The checkpoints of the CoConv authors (their repository, iduta/coconv), both ways.

Names are torchvision's, except that the 3×3 convolution of a block with several levels is stored level by level:
``layer1.0.conv2.conv2_1.weight``, ``layer1.0.conv2.conv2_2.weight`` and so on, to be concatenated in that order. Their
layer for networks of one's own, ``CoConv3x3_2d``, stores ``coconv_levels.0.weight`` and so on. All names may start with
DataParallel's ``module.``, and the tensors may be one entry, ``state_dict``, of what was saved.
"""

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from coconv_surgery.checkpoint.reading import CheckpointError, read_weights
from coconv_surgery.checkpoint.tensors import check_loadable
from coconv_surgery.layers.arguments import file_to_read, instance, shown
from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.levels import complete_levels
from coconv_surgery.layers.metadata import unchecked_levels
from coconv_surgery.layers.rollback import deep_restorer

# What follows the name of the convolution. A level has few digits: a number of a thousand is none.
_LEVEL = re.compile(
    r"(?:(?:(?<=\.conv2)|(?<=^conv2))\.conv2_|(?<=.)\.coconv_levels\.)(?P<level>[0-9]{1,4})\.(?P<kind>weight|bias)\Z"
)
_SHOWN = 200
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
        if key.startswith(prefix) and (match := _LEVEL.search(key)):
            found.setdefault((key[: match.start()], match["kind"]), {})[int(match["level"])] = key
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


def check_groups(model: nn.Module, splits: Mapping[str, Sequence[int]], prefix: str = "") -> None:
    """Check that the authors' levels mean what ours do: each of theirs has all the groups of a grouped convolution.

    Args:
        model: The network.
        splits: Output channels of each level, by the name of the convolution.
        prefix: What these names start with.

    Raises:
        ValueError: If a convolution has several of both.
    """
    for name, module in model.named_modules():
        levels = splits.get(f"{prefix}{name}", ())
        if isinstance(module, nn.Conv2d) and module.groups > 1 and len(levels) > 1:
            raise ValueError(
                f"{prefix}{name} has {module.groups} groups and {len(levels)} levels: every level of the authors' "
                "convolution reads all groups, and one of ours reads its own, so the same weights compute something "
                "else: take a network without groups, or with one level there"
            )


def is_authors_checkpoint(path: str | Path) -> bool:
    """Whether a checkpoint has a convolution stored level by level.

    Raises:
        CheckpointError: If the safe loader cannot read it.
        OSError: If it cannot be opened.
    """
    if file_to_read(path, "path").suffix in (".npz", ".npy"):  # which timm reads for networks of JAX
        return False
    return any(_LEVEL.search(name) for name in read_weights(path))


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
        CheckpointError: If it is not a complete checkpoint.
        ValueError: If it is not in the authors' layout, or does not fit the network: all that does not is named, and
            the network is left as it was.
        OSError: If it cannot be opened.

    Warns:
        UserWarning: If the network does not normalise after the addition, as theirs do.
    """
    instance(model, "model", nn.Module, "a torch.nn.Module")
    state = read_weights(path)
    _check_tensors(state, path)
    check_loadable(model, state, path)
    # Their shapes alone, until they are known to be the network's.
    merged: dict[str, Any] = {name: tensor.to("meta") for name, tensor in state.items()}
    try:
        splits = merge_levels(merged)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not splits:
        raise ValueError(
            f"{path} is not in the CoConv authors' layout, no convolution is stored level by level: "
            "load it as an ordinary checkpoint, with timm.models.load_checkpoint()"
        )
    try:
        check_groups(model, splits)
    except ValueError as error:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {error}") from error
    own = model.state_dict()
    problems = {
        "missing in the file": _summed_up(own.keys() - merged.keys(), merged),
        "unexpected in the file": _summed_up(merged.keys() - own.keys(), own),
        "of another shape": [
            f"{_cut(name)} ({_shape(merged[name])} in the file, {_shape(own[name])} in the network)"
            for name in own
            if name in merged and own[name].shape != merged[name].shape
        ],
        "with other levels": list(_other_levels(model, splits)),
    }
    lines = [f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names]
    if lines:
        raise ValueError(f"{path} does not fit {type(model).__name__}, which is left as it was:\n" + "\n".join(lines))
    warn_of_norm_order(model)
    merge_levels(state)
    with ExitStack() as undo:
        undo.callback(deep_restorer(model))
        with unchecked_levels():  # which the file tells by its layout
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
    check_groups(model, {name: conv.splits for name, conv in model.named_modules() if isinstance(conv, CoConv2d)})
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


def _check_tensors(state: Mapping[Any, Any], path: str | Path) -> None:
    if not state:
        raise CheckpointError(f"{path} holds no tensors")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path} holds a {type(value).__name__} under {shown(name)}, not a tensor by name")


def _other_levels(model: nn.Module, found: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        own = module.splits if isinstance(module, CoConv2d) else (module.out_channels,)
        stored = found.get(name, (module.out_channels,))
        if own != stored and sum(stored) == module.out_channels:
            yield f"{name} ({stored} in the file, {own} in the network)"


def _summed_up(names: Collection[str], others: Collection[str]) -> list[str]:
    """Names, a whole module as ``module.*`` where the other side has nothing of it."""
    # A module that lies deeper than either side has any is never the first that the other side lacks.
    depth = 1 + min(max((name.count(".") for name in side), default=0) for side in (names, others))
    inner = {prefix for name in others for prefix in _prefixes(name, depth)}
    summed = (next((f"{prefix}.*" for prefix in _prefixes(name, depth) if prefix not in inner), name) for name in names)
    return sorted({_cut(name): None for name in summed}, key=_natural)


def _prefixes(name: str, depth: int) -> list[str]:
    parts = name.split(".", depth)
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _natural(name: str) -> list[str | tuple[int, str]]:
    """What sorts ``layer2`` before ``layer10``."""
    return [(len(part), part) if part.isdigit() else part for part in re.split("([0-9]+)", name)]


def _cut(name: str) -> str:
    return name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…"


def _shape(tensor: torch.Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"
