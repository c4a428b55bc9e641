"""Plan a conversion, apply it in place, and undo it."""

import copy
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any, cast

import torch
import torch.fx as fx
import torch.nn as nn
from torch.nn.modules.lazy import LazyModuleMixin

from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.functional import Dilation, level_padding, pair
from coconv_surgery.layers.levels import check_levels, is_plain, scale_dilations
from coconv_surgery.layers.switch import to_coconv_, to_conv_
from coconv_surgery.merging import keep_levels_in_merges
from coconv_surgery.planning.eligibility import obstacle, other_operation, reason_to_leave, replaced_forward, subclass
from coconv_surgery.planning.patterns import Patterns, as_list, check_patterns, first_match
from coconv_surgery.planning.plan import ONE_LEVEL, Plan, PlanError, PlanRow, Signature
from coconv_surgery.planning.policies import Answer, Levels, Policy, get_policy, settle
from coconv_surgery.tracing.graphs import function_convs, node_to_coconv_, node_to_conv_
from coconv_surgery.tracing.inputs import InputSize, infer_inputs
from coconv_surgery.tracing.sites import find_convs
from coconv_surgery.tracing.trace import TracedConv, trace_network

_PLAN = "_coconv_plan"


class NoChangeWarning(UserWarning):
    """A conversion that changed nothing."""


def plan_conversion(
    model: nn.Module,
    policy: str | Policy = "resolution",
    *,
    input_size: InputSize | None = None,
    example_inputs: Any = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    overrides: Mapping[str, Answer | None] | None = None,
) -> Plan:
    """Decide what would become of every convolution of a network, and change nothing.

    Args:
        model: The network.
        policy: A policy, or the name of one: ``"resolution"``, ``"stage"``, ``"top"`` or ``"uniform"``.
        input_size: Side, (height, width) or (channels, height, width) of the input. Default: what timm says of the
            network.
        example_inputs: What to call the network with instead: a tensor, a tuple of arguments, a dict of them by name,
            or :class:`~coconv_surgery.Inputs`.
        include: Glob patterns of convolutions to consider, by qualified name; that of a module stands for all within.
            Default: all. The others stay what they are, plain or contextual.
        exclude: Patterns of convolutions that stay what they are.
        overrides: Levels by pattern; an exact name wins, else the first match, and both win over ``include`` and
            ``exclude``. A number, a sequence of dilations,
            :class:`~coconv_surgery.Levels`, or None to leave alone. The exact name of a convolution also reaches one
            that is otherwise left alone by choice, such as a 5×5 or a prediction layer.

    Returns:
        The plan, a row for every convolution.

    Raises:
        TypeError: If ``model`` is not a module that can be converted in place.
        ValueError: If the policy is unknown, the input size cannot be known or does not suit the network, or a pattern
            matches nothing.

    >>> import timm
    >>> plan = plan_conversion(timm.create_model("resnet18"), input_size=64)
    >>> plan.converted[0].name, plan.converted[0].dilations, plan.converted[0].splits
    ('layer1.0.conv1', (1, 2, 3), (32, 16, 16))
    """
    _check_model(model)
    decide = get_policy(policy)
    label = policy if isinstance(policy, str) else repr(policy)
    included, excluded = as_list("*" if include is None else include), as_list(exclude or ())
    overridden = dict(overrides or {})
    names = [name for first, aliases, _ in find_convs(model) for name in (first, *aliases)]
    given = {"include": included if include is not None else (), "exclude": excluded, "overrides": overridden}
    check_patterns(given, names)
    with torch.inference_mode(False):  # which would hide the dataflow
        inputs = infer_inputs(model, input_size, example_inputs)
        trace = trace_network(model, inputs)
    rows = []
    for conv in trace.convs:
        names_of_conv = (conv.name, *conv.aliases)
        override = first_match(names_of_conv, overridden)
        answer = None if override is None else overridden[override]
        source = f"policy {label}" if override is None else f"overrides[{override!r}]"
        if override is not None and answer is None:
            rows.append(_untouched_row(conv, "excluded"))
        elif override is None and first_match(names_of_conv, included) is None:
            rows.append(_untouched_row(conv, "not included"))
        elif override is None and first_match(names_of_conv, excluded) is not None:
            rows.append(_untouched_row(conv, "excluded"))
        elif override in names_of_conv and (reason := obstacle(conv)):
            raise ValueError(f"{source} names a conv that cannot be split: {reason}")
        elif override not in names_of_conv and (reason := obstacle(conv) or reason_to_leave(conv)):
            rows.append(_untouched_row(conv, reason))
        else:
            rows.append(_settled_row(conv, decide(conv) if answer is None else answer, source))
    return Plan(tuple(rows), policy=label, input=str(inputs), parameters=_count(model), traced=trace.how)


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Make a network what a plan says, in place.

    Every row is checked first; if one does not fit, nothing is changed. Modules, parameters, optimizer state, hooks and
    flags stay what they are: only the class of a convolution changes (or the node, where it is a function call in a
    graph module).

    Args:
        model: The network, plain or converted.
        plan: A plan made for it, or for another instance of the same architecture.

    Returns:
        The same model object.

    Raises:
        TypeError: If ``model`` is not a module that can be converted in place.
        PlanError: If convolutions are missing, unexpected or changed; all of them are named.
    """
    if not _apply(model, plan):
        warnings.warn(_no_change(model, plan), NoChangeWarning, stacklevel=2)
    return model


def convert(
    model: nn.Module,
    policy: str | Policy = "resolution",
    *,
    input_size: InputSize | None = None,
    example_inputs: Any = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    overrides: Mapping[str, Answer | None] | None = None,
    inplace: bool = True,
) -> nn.Module:
    """Replace the eligible 3×3 convolutions of a network with contextual ones: plan and apply.

    Weights, their number and their names, and the state of an optimizer that holds them stay the same. The outputs do
    not: fine-tune, or train anew. A network that is compiled, scripted or wrapped for data parallelism must be
    converted before it is.

    Args:
        model: The network.
        policy: As in :func:`plan_conversion`, like all that follow.
        input_size: As in :func:`plan_conversion`.
        example_inputs: As in :func:`plan_conversion`.
        include: As in :func:`plan_conversion`.
        exclude: As in :func:`plan_conversion`.
        overrides: As in :func:`plan_conversion`.
        inplace: Whether to convert the network itself rather than a copy.

    Returns:
        The same model object, or the converted copy.

    Raises:
        TypeError: As in :func:`plan_conversion`.
        ValueError: As in :func:`plan_conversion`.

    >>> import timm
    >>> model = convert(timm.create_model("resnet50"))
    >>> get_plan(model).summary().split(";")[0]
    '53 convs: 13 converted, 40 left alone (36 kernel 1×1'
    """
    plan = plan_conversion(
        model,
        policy,
        input_size=input_size,
        example_inputs=example_inputs,
        include=include,
        exclude=exclude,
        overrides=overrides,
    )
    model = model if inplace else copy.deepcopy(model)
    if not _apply(model, plan):
        warnings.warn(_no_change(model, plan), NoChangeWarning, stacklevel=2)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Turn every contextual convolution of a network into the plain one it replaces: the exact inverse of a conversion.

    Args:
        model: A converted network.

    Returns:
        The same model object.

    Raises:
        TypeError: If ``model`` is not a module that can be converted in place.
    """
    _check_model(model)
    nodes = dict(function_convs(model)) if isinstance(model, fx.GraphModule) else {}
    for name, _, conv in find_convs(model):
        if isinstance(conv, CoConv2d) and not subclass(TracedConv(name, conv)):
            node_to_conv_(nodes[name]) if name in nodes else to_conv_(conv)
    _recompile(model)
    _notes(model).pop(_PLAN, None)
    return model


def get_plan(model: nn.Module) -> Plan:
    """Read back what a network is.

    Args:
        model: A network, converted or not.

    Returns:
        The plan it was converted by, as long as that still describes it; else one read off its modules, without map
        sizes.
    """
    rows = tuple(_found_row(name, aliases, conv) for name, aliases, conv in find_convs(model))
    found = Plan(rows, policy="as found", input="unknown", parameters=_count(model))
    remembered = _notes(model).get(_PLAN)
    if not isinstance(remembered, Plan) or remembered.diff(found):
        return found
    return replace(remembered, parameters=found.parameters)  # a new classifier may have come since


# -- Changes ------------------------------------------------------------------------------------------------------


def _apply(model: nn.Module, plan: Plan) -> bool:
    _check_model(model)
    convs = {name: conv for name, _, conv in find_convs(model)}
    _check_plan(convs, plan)
    changes = [row for row in plan.rows if _state(convs[row.name]) != _planned_state(row, convs[row.name])]
    nodes = dict(function_convs(model)) if isinstance(model, fx.GraphModule) else {}
    for row in changes:
        if row.name in nodes and row.converted:
            node_to_coconv_(nodes[row.name], row.dilations, row.splits)
        elif row.name in nodes:
            node_to_conv_(nodes[row.name])
        elif row.converted:
            to_coconv_(convs[row.name], row.dilations, row.splits)
        else:
            to_conv_(cast(CoConv2d, convs[row.name]))
    _recompile(model)
    keep_levels_in_merges(model)
    _notes(model)[_PLAN] = plan
    return bool(changes)


def _no_change(model: nn.Module, plan: Plan) -> str:
    what = "was already as planned, nothing changed" if plan.converted else "has no convolution to convert"
    return f"{type(model).__name__} {what}: {plan.summary()}"


# -- Rows ---------------------------------------------------------------------------------------------------------


def _untouched_row(conv: TracedConv, reason: str) -> PlanRow:
    contextual = isinstance(conv.conv, CoConv2d)
    return _row(conv, Levels(*_state(conv.conv)), None if contextual else reason)


def _settled_row(conv: TracedConv, answer: Answer, source: str) -> PlanRow:
    try:
        levels = settle(conv.conv, answer)
        _check_maps(conv, levels)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} gave {conv.name} the levels {answer!r}: {error}") from error
    if is_plain(conv.conv, levels.dilations):
        return _row(conv, reason=ONE_LEVEL)
    return _row(conv, levels)


def _row(conv: TracedConv, levels: Levels | None = None, reason: str | None = None) -> PlanRow:
    signature = Signature.of(conv.conv)
    dilations, splits = levels or _plain_state(conv.conv)
    assert not isinstance(splits, str)
    return PlanRow(
        conv.name,
        signature,
        dilations,
        splits,
        reason,
        calls=len(conv.calls),
        output_sizes=tuple(dict.fromkeys(call.output_size for call in conv.calls)),
        aliases=conv.aliases,
        untraced=conv.untraced,
    )


def _found_row(name: str, aliases: tuple[str, ...], conv: nn.Conv2d) -> PlanRow:
    dilations, splits = _state(conv)
    reason = None if isinstance(conv, CoConv2d) else "a plain conv"
    return PlanRow(name, Signature.of(conv), dilations, splits, reason, aliases=aliases)


def _planned_state(row: PlanRow, conv: nn.Conv2d) -> tuple[tuple[Dilation, ...], tuple[int, ...]]:
    """What a row makes of a convolution; a reason to leave it alone counts more than levels that stand beside it."""
    return (row.dilations, row.splits) if row.converted else _plain_state(conv)


def _state(conv: nn.Conv2d) -> tuple[tuple[Dilation, ...], tuple[int, ...]]:
    if isinstance(conv, CoConv2d):
        return conv.dilations, conv.splits
    return _plain_state(conv)


def _plain_state(conv: nn.Conv2d) -> tuple[tuple[Dilation, ...], tuple[int, ...]]:
    signature = Signature.of(conv)
    return scale_dilations(signature.dilation, [1]), (signature.out_channels,)


def _check_maps(conv: TracedConv, levels: Levels) -> None:
    mode = conv.conv.padding_mode
    if mode not in ("reflect", "circular"):
        return
    signature = Signature.of(conv.conv)
    for call in conv.calls:
        for dilation in levels.dilations:
            paddings = level_padding(signature.kernel_size, signature.padding, signature.dilation, pair(dilation))
            for side, padding in zip(call.input_size, paddings, strict=True):
                if padding > side - (mode == "reflect"):
                    raise ValueError(
                        f"{mode} padding of {padding} at dilation {dilation} needs more than a side of {side}"
                    )


# -- Checks -------------------------------------------------------------------------------------------------------

_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    for name, module in model.named_modules():
        path = f"model.{name}" if name else "model"
        for cls in type(module).__mro__:
            if cls.__name__ in _WRAPPERS:
                raise TypeError(
                    f"{path} is wrapped in {type(module).__name__}: convert {path}.{_WRAPPERS[cls.__name__]} instead, "
                    "best before wrapping it"
                )
        replaced = isinstance(vars(module).get("forward"), FunctionType)
        if replaced and any(isinstance(child, nn.Conv2d) for child in module.modules() if child is not module):
            raise TypeError(
                f"the forward of {path} was replaced by a function, which a copy of it would share: convert it "
                "before replacing (or compiling) its forward"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{path} is scripted, its convolutions are compiled in: convert it before torch.jit")
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise ValueError(
                f"{path} is a lazy {type(module).__name__} without weights yet: run the network once first"
            )


def _check_plan(convs: Mapping[str, nn.Conv2d], plan: Plan) -> None:
    rows = {row.name: row for row in plan.rows}
    problems = {
        "repeated in the plan": [name for name, count in Counter(row.name for row in plan.rows).items() if count > 1],
        "missing in the network": [name for name in rows if name not in convs],
        "unexpected in the network": [name for name in convs if name not in rows],
        "different in the network": [],
    }
    for name in rows.keys() & convs.keys():
        row, conv = rows[name], convs[name]
        if differences := Signature.of(conv).differences(row.signature):
            problems["different in the network"].append(f"{name} ({differences})")
        elif row.converted and _state(conv) != (row.dilations, row.splits):
            try:
                found = TracedConv(name, conv)
                reason = other_operation(found) or subclass(found) or replaced_forward(found)
                if reason is None:
                    check_levels(conv, row.dilations, row.splits)
            except ValueError as error:
                reason = str(error)
            if reason is not None:
                problems["different in the network"].append(f"{name} ({reason})")
    lines = [f"{len(names)} {problem}: {_shorten(sorted(names))}" for problem, names in problems.items() if names]
    if lines:
        raise PlanError("the plan does not fit this network, which is left as it was:\n" + "\n".join(lines))


def _shorten(names: Sequence[str], limit: int = 5) -> str:
    return "; ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# -- The network as a whole ---------------------------------------------------------------------------------------


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _recompile(model: nn.Module) -> None:
    if isinstance(model, fx.GraphModule):
        model.recompile()


def _notes(model: nn.Module) -> dict[str, Any]:
    # A graph module loses other attributes when it is copied.
    return model.meta if isinstance(model, fx.GraphModule) else vars(model)
