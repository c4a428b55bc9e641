"""mmengine compares levels where it loads a checkpoint: in runners, ``init_detector`` and inferencers alike.

A contextual convolution reports other levels as an error, but mmengine loads without strictness by default, and then
logs what is reported and goes on. A plain network reports nothing at all.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import mmengine.runner.checkpoint as checkpoints
import torch.nn as nn
from mmengine.model import BaseTTAModel, is_model_wrapper

from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.metadata import is_converted, levels_differ
from coconv_surgery.planning.plan import PlanError

_SHOWN = 10


def compare_levels() -> None:
    """Let mmengine's loader refuse, before it changes anything, weights that come from other levels than a network has.

    It may be applied again.
    """
    checkpoints.load_state_dict = _load_state_dict


_upstream_load_state_dict = checkpoints.load_state_dict


def _load_state_dict(module: nn.Module, state_dict: Any, strict: bool = False, logger: Any = None) -> Any:
    metadata = getattr(state_dict, "_metadata", {})
    rows = [
        f"{name}: {difference}"
        for name, part in (_modules(module) if is_converted(state_dict) else ())
        if (difference := levels_differ(metadata.get(name, {}), _levels(part))) is not None
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
    return _upstream_load_state_dict(module, state_dict, strict, logger)


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
