"""Parts of a network that have the weights of others, and were left plain because they did not run."""

import functools
from itertools import takewhile

import torch
import torch.nn as nn

from coconv_surgery.planning.plan import Plan, PlanRow
from coconv_surgery.planning.reasons import Reason

_NEAR = 0.5  # of the norm of its weights, within which a part is a copy: others are further apart than the norm itself


def plain_copies(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Parts that a training keeps as slow copies of others, as momentum contrast and mean teachers do.

    Args:
        model: A network.
        plan: The plan that it was converted by.

    Returns:
        Names of parts that did not run, with those of the converted parts that have nearly the same weights.
    """
    found: dict[str, str] = {}
    for row in (row for row in plan.rows if row.reason_key is Reason.NOT_CALLED):
        alike = [other for other in plan.converted if row.signature == other.signature]
        other = max(alike, key=functools.partial(_in_common, row), default=row)
        if other is not row and (parts := _in_common(row, other)):
            copy, of = (each.name.rsplit(".", parts)[0] for each in (row, other))
            if copy not in found and _are_near(model, row.name, other.name):
                found[copy] = of
    return found


def _in_common(row: PlanRow, other: PlanRow) -> int:
    """How many parts the names of two convolutions have in common at their ends; one is left of each."""
    pairs = zip(row.name.split(".")[:0:-1], other.name.split(".")[:0:-1], strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _are_near(model: nn.Module, name: str, other: str) -> bool:
    one, another = (_weight_of(model, each) for each in (name, other))
    if one is None or another is None or one.is_meta or another.is_meta:
        return False
    return float((one - another.to(one)).norm()) < _NEAR * float(one.norm())


def _weight_of(model: nn.Module, name: str) -> torch.Tensor | None:
    try:
        weight = model.get_submodule(name).weight
    except AttributeError:  # a call in a graph
        return None
    return weight.detach() if isinstance(weight, torch.Tensor) else None
