"""The plan that a network was converted by, kept with the network, in its state dicts, and in a guard's buffer.

A state dict's ``_metadata`` holds the plan of the network, and of every part that was converted on its own, beside the
levels of each convolution, see :mod:`coconv_surgery.layers.metadata`.
"""

import functools
import hashlib
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
import torch.fx as fx
import torch.nn as nn

from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.metadata import compare_plain
from coconv_surgery.layers.rollback import refill
from coconv_surgery.planning.plan import Plan
from coconv_surgery.tracing.inputs import Inputs, InputSize, infer_inputs

KEY = "coconv_plan"
GUARD = "converted_by_coconv_surgery_"
_ATTRIBUTE = "_coconv_plan"


def noted_plan(model: nn.Module) -> Plan | None:
    """The plan that is kept with a network, whether it still describes it or not."""
    plan = attributes_kept_by(model).get(_ATTRIBUTE)
    return plan if isinstance(plan, Plan) else None


def size_planned_for(model: nn.Module) -> tuple[int, int, int] | None:
    """Channels, height and width of the image that a conversion was planned for; None if that is not all it takes."""
    plan = noted_plan(model)
    image = plan and re.fullmatch(r"1×(\d+)×(\d+)×(\d+)", plan.input)
    return (int(image[1]), int(image[2]), int(image[3])) if image else None


def inputs_for(model: nn.Module, input_size: InputSize | None = None, example_inputs: Any = None) -> Inputs:
    """What to call a network with: as of :func:`infer_inputs`, or else what :func:`size_planned_for` says."""
    return infer_inputs(model, input_size, example_inputs, size_planned_for(model))


def note_plan(model: nn.Module, plan: Plan | None, undo: ExitStack) -> None:
    """Keep a plan with a network and in its state dicts, or forget it.

    Args:
        model: The network.
        plan: The plan, or None.
        undo: Takes what puts everything back, see :mod:`coconv_surgery.layers.rollback`.
    """
    before = noted_plan(model)
    if plan is None and before is None:
        return
    undo.callback(_set_plan, model, before)
    _set_plan(model, plan)
    register = functools.partial(model._register_state_dict_hook, _write_plan)
    _set_hooks(model._state_dict_hooks, _write_plan, register, int(plan is not None), undo)
    # One for each network with a plan that a convolution is in, so that a part can be reverted.
    change = int(plan is not None) - int(before is not None)
    for conv in _convolutions(model):
        held = len(_held(conv._load_state_dict_pre_hooks, compare_plain))
        _compare(conv, max(held + change, int(plan is not None)), undo)


def compare_no_more(model: nn.Module, undo: ExitStack) -> None:
    """Let the plain convolutions of a network, or of a part of one, load whatever they are given again.

    Args:
        model: The network.
        undo: Takes what puts everything back.
    """
    for conv in _convolutions(model):
        _compare(conv, 0, undo)


def is_guard(name: str) -> bool:
    """Whether an entry of a state dict is a guard's, of the network or of a part."""
    return name.rpartition(".")[2].startswith(GUARD)


def is_guarded(model: nn.Module) -> bool:
    """Whether a network holds a guard's buffer."""
    return any(map(is_guard, model._buffers))


def set_guard(model: nn.Module, plan: Plan | None, undo: ExitStack) -> None:
    """Give a network the buffer that no plain one has a place for, in the stead of the one it had; or take it out.

    Args:
        model: The network.
        plan: Its plan, or None.
        undo: Takes what puts everything back.
    """
    buffers, transient = model._buffers, model._non_persistent_buffers_set
    undo.callback(refill, transient, transient.copy())
    undo.callback(refill, buffers, buffers.copy())
    for name in list(filter(is_guard, model._buffers)):
        delattr(model, name)
    if plan is not None and plan.converted:
        device = next((tensor.device for tensor in model.state_dict().values() if torch.is_tensor(tensor)), None)
        name, content = guard_of(plan)
        model.register_buffer(name, content.to(device))


def guard_of(plan: Plan) -> tuple[str, torch.Tensor]:
    """Name and content of a guard's buffer: the same for all networks with the same convolutions and levels.

    Returns:
        A name that tells two plans apart, and the plan as UTF-8 bytes. They are floats, as averages of whole numbers
        are cut off.
    """
    rows = (
        replace(row, reason=None if row.converted else "left alone", reason_key=None, calls=0, output_sizes=())
        for row in plan.rows
    )
    bare = Plan(tuple(replace(row, aliases=(), untraced=None) for row in rows), "as found", "unknown", parameters=0)
    content = bare.to_json().encode()
    held = torch.frombuffer(bytearray(content), dtype=torch.uint8).float()
    return GUARD + hashlib.sha256(content).hexdigest()[:8], held


def text_in_guard(content: torch.Tensor) -> bytes:
    """What a guard's buffer holds, also where it was averaged, or is of the whole numbers that it was made of before.

    Returns:
        The plan as JSON, or nothing if it holds no bytes.
    """
    numbers = content.flatten().double().round()
    return bytes(numbers.to(torch.uint8).tolist()) if ((numbers >= 0) & (numbers < 256)).all() else b""


def _set_plan(model: nn.Module, plan: Plan | None) -> None:
    attributes = attributes_kept_by(model)
    if plan is None:
        attributes.pop(_ATTRIBUTE, None)
    else:
        attributes[_ATTRIBUTE] = plan


def _convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def _compare(conv: nn.Conv2d, count: int, undo: ExitStack) -> None:
    """Let a convolution hold so many hooks that compare."""
    register = functools.partial(conv._register_load_state_dict_pre_hook, compare_plain)
    _set_hooks(conv._load_state_dict_pre_hooks, compare_plain, register, count, undo)


def _held(table: dict[int, Any], hook: Callable[..., None]) -> list[int]:
    return [key for key, kept in table.items() if getattr(kept, "hook", kept) is hook]  # torch wraps some


def _set_hooks(
    table: dict[int, Any], hook: Callable[..., None], register: Callable[[], Any], count: int, undo: ExitStack
) -> None:
    """Let a table of hooks hold a hook so often."""
    held = _held(table, hook)
    if len(held) == count:
        return
    undo.callback(refill, table, table.copy())
    for _ in range(count - len(held)):
        register()
    for key in held[count:]:
        del table[key]


def _write_plan(model: nn.Module, state_dict: Any, prefix: str, metadata: dict[str, Any]) -> None:
    if (plan := noted_plan(model)) is not None and _still_holds(model, plan):
        metadata[KEY] = plan.to_json()


def _still_holds(model: nn.Module, plan: Plan) -> bool:
    """Whether the modules that a plan converted are there and have its levels; a function call in a graph is none."""
    modules = dict(model.named_modules(remove_duplicate=False))
    calls_functions = any(isinstance(module, fx.GraphModule) for module in modules.values())
    for row in plan.converted:
        conv = modules.get(row.name)
        if not isinstance(conv, nn.Conv2d):
            if calls_functions:
                continue
            return False
        if (conv.contextual_levels if isinstance(conv, CoConv2d) else None) != (row.dilations, row.splits):
            return False
    return True


def attributes_kept_by(model: nn.Module) -> dict[str, Any]:
    """Where a network keeps what stays with it when it is copied."""
    # Of its own attributes, a graph module keeps its meta alone when it is copied. Some have none.
    kept = isinstance(model, fx.GraphModule) and isinstance(vars(model).get("meta"), dict)
    return cast(dict[str, Any], vars(model)["meta"]) if kept else vars(model)
