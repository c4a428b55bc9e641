"""Parts of a network that are built as others are, and were left plain because they did not run."""

from itertools import takewhile

import torch.nn as nn

from coconv_surgery.planning.plan import Plan
from coconv_surgery.planning.reasons import Reason


def plain_copies(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Parts that a training may keep as slow copies of others, as momentum contrast and mean teachers do.

    Args:
        model: A network.
        plan: The plan that it was converted by.

    Returns:
        Names of parts that did not run, with those of the converted parts that have the same weights.
    """
    idle = [row for row in plan.rows if row.reason_key is Reason.NOT_CALLED]
    pairs = {
        pair: None
        for row in idle
        for other in plan.converted
        if row.signature == other.signature and (pair := _prefixes(row.name, other.name))
    }
    return {copy: of for copy, of in pairs if _shapes(model, copy) == _shapes(model, of)}


def _prefixes(name: str, other: str) -> tuple[str, str] | None:
    """What stands before the last parts that two names have in common; None for blocks of one sequence."""
    parts, others = name.split("."), other.split(".")
    alike = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(reversed(parts), reversed(others), strict=False))))
    parts, others = parts[: len(parts) - alike], others[: len(others) - alike]
    if not (alike and parts and others) or (parts[-1].isdigit() and others[-1].isdigit()):
        return None
    return ".".join(parts), ".".join(others)


def _shapes(model: nn.Module, name: str) -> dict[str, tuple[int, ...]] | None:
    try:
        part = model.get_submodule(name)
    except AttributeError:  # a name within a graph
        return None
    return {name: tuple(tensor.shape) for name, tensor in (*part.named_parameters(), *part.named_buffers())}
