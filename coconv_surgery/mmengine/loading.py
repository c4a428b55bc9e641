"""mmengine compares levels where it loads a checkpoint: in runners, ``init_detector`` and inferencers alike.

A contextual convolution reports other levels as an error, but mmengine loads without strictness by default, and then
logs what is reported and goes on. A plain network reports nothing at all.

It also renames keys, by ``revise_keys`` or the ``prefix`` of an ``init_cfg``, and leaves the metadata under the old
names, or behind. The tensors stay the same ones, so each is remembered with what its file told when that was read.
"""

from bisect import bisect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import mmengine.runner.checkpoint as checkpoints
import torch
import torch.nn as nn
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch.utils.weak import WeakTensorKeyDictionary

from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.metadata import KEY, levels_differ
from coconv_surgery.planning.plan import PlanError

_SHOWN = 10


class _Origin(NamedTuple):
    """Where in a file a tensor was."""

    key: str
    metadata: Mapping[str, Any]


_origins: Any = WeakTensorKeyDictionary()  # type: ignore[no-untyped-call]


def compare_levels() -> None:
    """Let mmengine's loader refuse, before it changes anything, weights that come from other levels than a network has.

    It may be applied again.
    """
    checkpoints.CheckpointLoader.load_checkpoint = _load_checkpoint
    checkpoints.load_state_dict = _load_state_dict


_upstream_load_checkpoint = checkpoints.CheckpointLoader.load_checkpoint
_upstream_load_state_dict = checkpoints.load_state_dict


def _load_checkpoint(*args: Any, **kwargs: Any) -> Any:
    checkpoint = _upstream_load_checkpoint(*args, **kwargs)
    states = (checkpoint, *checkpoint.values()) if isinstance(checkpoint, Mapping) else ()
    for state in states:
        metadata = getattr(state, "_metadata", {})
        for key, tensor in state.items() if metadata else ():
            if isinstance(tensor, torch.Tensor):
                _origins[tensor] = _Origin(key, metadata)
    return checkpoint


def _load_state_dict(module: nn.Module, state_dict: Any, strict: bool = False, logger: Any = None) -> Any:
    told = _told(module, state_dict)
    if not any(KEY in metadata for metadata in told.values()):
        return _upstream_load_state_dict(module, state_dict, strict, logger)
    rows = [
        f"{name}: {difference}"
        for name, part in _modules(module)
        if (difference := levels_differ(told.get(name, {}), _levels(part))) is not None
    ]
    if rows:
        more = [f"and {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else []
        raise PlanError(
            "the checkpoint comes from a network that coconv_surgery converted in another way than this one; its "
            "weights would load and predict wrongly:\n"
            + "\n".join(rows[:_SHOWN] + more)
            + "\nConvert this one the same way, in a config by surgery=dict(plan='coconv_plan.json') of its work dir. "
            "To load it anyway: CoConvPlanHook(strict=False) in a config, coconv_surgery.unchecked_levels() in code"
        )
    renamed: Any = OrderedDict(state_dict)
    renamed._metadata = {**getattr(state_dict, "_metadata", {}), **told}
    return _upstream_load_state_dict(module, renamed, strict, logger)


def _told(module: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What is told of each module that is given weights, by the name that it has here."""
    metadata = getattr(state_dict, "_metadata", {})
    keys = sorted(state_dict)
    told = {}
    for name, _ in _modules(module):
        start = f"{name}." if name else ""
        key = next(iter(keys[(place := bisect(keys, start)) : place + 1]), "")
        if key.startswith(start):
            tensor = state_dict[key]
            known = _origins.get(tensor) if isinstance(tensor, torch.Tensor) else None
            noted = metadata.get(name) if known is None else known.metadata.get(_old_name(name, key, known.key))
            told[name] = noted or {}
    return told


def _old_name(name: str, key: str, old_key: str) -> str | None:
    """What a module was called, one of whose tensors had another key."""
    own = f".{key}".removeprefix(f".{name}" if name else "")
    return f".{old_key}".removesuffix(own)[1:] if f".{old_key}".endswith(own) else None


def _levels(module: nn.Module) -> Any:
    return module.contextual_levels if isinstance(module, CoConv2d) else None


def _modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules by the names under which mmengine loads them, to which wrappers add nothing."""
    if is_model_wrapper(module) or isinstance(module, BaseTTAModel):
        module = cast(nn.Module, module.module)
    yield prefix, module
    children: Mapping[str, nn.Module | None] = module._modules
    for name, child in children.items():
        if child is not None:
            yield from _modules(child, f"{prefix}.{name}".removeprefix("."))
