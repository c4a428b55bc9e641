"""What a file or a state dict says of how its network was converted."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from coconv_surgery.checkpoint.header import plan_in_header, read_header
from coconv_surgery.checkpoint.naming import prefix_of
from coconv_surgery.checkpoint.reading import (
    CheckpointError,
    is_safetensors,
    read_checkpoint,
    state_in,
    states_elsewhere,
    usual_states,
)
from coconv_surgery.layers import metadata
from coconv_surgery.layers.arguments import file_to_read, shown
from coconv_surgery.planning import notes
from coconv_surgery.planning.plan import Plan, PlanRow, read_plan_text
from coconv_surgery.surgery import get_plan
from coconv_surgery.tracing.signature import Signature


def plan_of(source: str | Path | Mapping[str, Any]) -> Plan | None:
    """Read how the network was converted that a file or a state dict comes from.

    It is told by files of :func:`save_converted`; by state dicts of networks that :func:`convert` or
    :func:`apply_plan` converted, as ``state_dict()`` gives them and ``torch.save`` and mmengine write them; by
    checkpoints that ``CoConvPlanHook`` took part in; and by whatever holds the entry of :func:`guard`.

    Args:
        source: The path of a safetensors file or of one that ``torch.save`` wrote; no code in it is executed. Or what
            was read from it: a state dict, or a dict with one under a usual name.

    Returns:
        The plan of what was converted: where that is a part of the saved network, as the backbone of a detector is, of
        the part; where levels were given without a plan, as by :func:`to_coconv_`, of the contextual convolutions
        alone, and its number of parameters is 0. None if nothing is said: the network was plain, or what
        saved it dropped the metadata, as safetensors does and whoever builds a new dict from the tensors.

    Raises:
        TypeError: If it is neither a path nor a dict.
        PlanError: If what it says is not a plan.
        CheckpointError: If the file cannot be read, or what it says makes no sense.
        OSError: If the file cannot be opened.

    >>> import timm
    >>> from coconv_surgery import convert
    >>> plan = plan_of(convert(timm.create_model("resnet18")).state_dict())
    >>> plan.converted[0].name, plan.converted[0].dilations
    ('layer1.0.conv1', (1, 2, 3, 4))
    """
    if isinstance(source, Mapping):
        return _plan_in(source, "the state dict")
    path = file_to_read(source, "source", "the path of a file, or a state dict")
    return plan_if_told(read_checkpoint(path), path)


def read_plan(path: str | Path) -> Plan:
    """Read the plan of a file that tells one, see :func:`plan_of`.

    Raises:
        TypeError: If it is not a path.
        PlanError: If what it says is not a plan.
        CheckpointError: If it cannot be read, or tells no plan.
        OSError: If it cannot be opened.
    """
    path = file_to_read(path, "path")
    return plan_told(read_checkpoint(path), path)


def plan_told(content: Mapping[Any, Any], path: str | Path, own: Mapping[str, Any] | None = None) -> Plan:
    """The plan of a file, as :func:`read_plan` gives it, of which the content was read.

    Args:
        content: What was read.
        path: The file.
        own: The weights of the network that the plan is for, if it is known.

    Raises:
        PlanError: If what it says is not a plan.
        CheckpointError: If it tells no plan.
    """
    plan = plan_if_told(content, path, own)
    if plan is None:
        raise CheckpointError(
            f"{path} holds no plan: it comes from a plain network, or what wrote it dropped what torch keeps with a "
            "state dict; save_converted() writes one"
        )
    return plan


def plan_for(model: nn.Module, plan: Plan) -> Plan:
    """A plan by the names that a network's convolutions have, without what is put before all of them in the plan.

    Args:
        model: The network.
        plan: A plan of it within another, such as a module of Lightning's.
    """
    return _without(prefix_of(_names_in(plan), _names_in(get_plan(model))), plan)


def plan_if_told(content: Mapping[Any, Any], path: str | Path, own: Mapping[str, Any] | None = None) -> Plan | None:
    """The plan of a file, as :func:`plan_told` gives it; None if it tells none."""
    in_header = plan_in_header(read_header(path), path) if is_safetensors(path) else None
    return _plan_in(content, str(path), own) if in_header is None else _unwrapped(in_header, content, own)


def _plan_in(content: Mapping[Any, Any], label: str, own: Mapping[str, Any] | None = None) -> Plan | None:
    meta = content.get("meta")
    if isinstance(meta, Mapping) and isinstance(text := meta.get(notes.KEY), str):
        return read_plan_text(text, label)
    usual = usual_states(content)
    for state in (content, *usual):
        if plan := _plan_in_metadata(state, label) or _plan_in_guard(state, label):
            return _unwrapped(plan, state, own)
        if isinstance(getattr(state, "_metadata", None), Mapping):
            return None  # plain; what is beside it are other weights
    return None if usual else _plan_elsewhere(content, label, own)


def _plan_elsewhere(content: Mapping[Any, Any], label: str, own: Mapping[str, Any] | None) -> Plan | None:
    """The plan of weights under an unusual name: of those that are a network's, or of the ones that tell a plan."""
    states = states_elsewhere(content)
    if own is not None:
        state = state_in(content, label, own)
        states = {key: value for key, value in states.items() if value is state}
    plans = {
        key: _unwrapped(plan, state, own)
        for key, state in states.items()
        if (plan := _plan_in_metadata(state, label) or _plan_in_guard(state, label))
    }
    first = next(iter(plans.values()), None)
    if any(plan != first for plan in plans.values()):
        raise CheckpointError(
            f"{label} holds converted networks under {', '.join(map(shown, plans))}: give plan_of() the one you mean"
        )
    return first


def _plan_in_metadata(state: Mapping[Any, Any], label: str) -> Plan | None:
    """Join the plans of a network's parts, and see that they still tell all levels that its convolutions have."""
    noted = getattr(state, "_metadata", None)
    if not isinstance(noted, Mapping):
        return None
    parts = {name: part for name, part in noted.items() if isinstance(name, str) and isinstance(part, Mapping)}
    plans = {name: read_plan_text(str(part[notes.KEY]), label) for name, part in parts.items() if notes.KEY in part}
    plans = _outermost(plans)
    planned = {
        _join(name, own): {"dilations": row.dilations, "splits": row.splits}
        for name, plan in plans.items()
        for row in plan.converted
        for own in (row.name, *row.aliases)
    }
    levels = {name: part[metadata.KEY] for name, part in parts.items() if metadata.KEY in part}
    differs = any(levels[name] != planned.get(name) for name in levels)
    plan = _found(parts, label) if differs else _joined(plans)
    images = [told for part in parts.values() if isinstance(told := part.get(metadata.CALIBRATED), int)]
    stale = any(metadata.STALE in part for part in parts.values())
    return plan if plan is None else replace(plan, calibrated=max(images, default=0), stale=stale)


def _found(parts: Mapping[str, Mapping[Any, Any]], label: str) -> Plan:
    """The levels of convolutions that no plan tells, or another than they have now."""
    try:
        rows = tuple(
            PlanRow(name, Signature(**part[metadata.CONV]), **part[metadata.KEY])
            for name, part in parts.items()
            if metadata.KEY in part
        )
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{label}: what its metadata say of the levels makes no sense: {error}") from error
    return Plan(rows, "as found", "unknown", parameters=0)


def _plan_in_guard(state: Mapping[Any, Any], label: str) -> Plan | None:
    plans = {
        name.rpartition(".")[0]: read_plan_text(notes.text_in_guard(tensor), f"{label}: {name}")
        for name, tensor in state.items()
        if isinstance(name, str) and notes.is_guard(name) and torch.is_tensor(tensor) and not tensor.is_meta
    }
    return _joined(_outermost(plans))


def _outermost(plans: Mapping[str, Plan]) -> dict[str, Plan]:
    """The plans that are not those of parts of another's network, which tells all that they do."""
    return {name: plan for name, plan in plans.items() if not any(_is_within(name, other) for other in plans)}


def _joined(plans: Mapping[str, Plan]) -> Plan | None:
    """One plan of those of a network's parts, by the names of the whole."""
    whole = [_within(plan, name) for name, plan in plans.items()]
    if len(whole) < 2:
        return whole[0] if whole else None
    rows = tuple(row for plan in whole for row in plan.rows)
    told = ("; ".join(dict.fromkeys(getattr(plan, field) for plan in whole)) for field in ("policy", "input", "traced"))
    policy, input_, traced = told
    return Plan(rows, policy, input_, sum(plan.parameters for plan in whole), traced)


def _within(plan: Plan, part: str) -> Plan:
    """The plan of a part, by the names of the whole."""
    return _renamed(plan, lambda name: _join(part, name))


def _unwrapped(plan: Plan, state: Mapping[Any, Any], own: Mapping[str, Any] | None) -> Plan:
    """A plan by the names that its weights are loaded by: without what is put before all of them, or was."""
    plan = _without(prefix_of({str(key): value for key, value in state.items()}, own), plan)
    if own is None:
        return plan
    modules = {name: None for weight in own for name in accumulate(weight.split("."), "{}.{}".format)}
    return _without(prefix_of(_names_in(plan), modules), plan)


def _without(prefix: str, plan: Plan) -> Plan:
    return _renamed(plan, lambda name: f"{name}.".removeprefix(prefix).removesuffix("."))


def _names_in(plan: Plan) -> dict[str, PlanRow]:
    return {name: row for row in plan.rows for name in (row.name, *row.aliases)}


def _renamed(plan: Plan, rename: Callable[[str], str]) -> Plan:
    rows = (replace(row, name=rename(row.name), aliases=tuple(map(rename, row.aliases))) for row in plan.rows)
    return replace(plan, rows=tuple(rows))


def _is_within(name: str, other: str) -> bool:
    return name != other and name.startswith(f"{other}." if other else "")


def _join(*names: str) -> str:
    return ".".join(filter(None, names))
