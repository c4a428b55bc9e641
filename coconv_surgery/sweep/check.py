"""One network, planned, converted, run and reverted."""

import contextlib
import json
import logging
import re
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from coconv_surgery.planning.plan import Plan, count_parameters
from coconv_surgery.planning.reasons import Reason
from coconv_surgery.surgery import apply_plan, plan_conversion, revert
from coconv_surgery.sweep.collections import Collection
from coconv_surgery.tracing.inputs import Inputs
from coconv_surgery.tracing.twin import Twin

_PLACES = re.compile(r"https?://[^\s'\"]+|/(?:[\w.+-]+/)+")  # this machine's folders, and addresses that it asks
CONVERTED, NOT_BUILT, FAILED, CRASHED = "converted", "not built", "failed", "crashed"


@dataclass(kw_only=True)
class Row:
    """What a conversion did to one network.

    Attributes:
        name: The network.
        family: Its family.
        status: ``"converted"``, ``"not built"`` (the collection itself cannot build it here), ``"failed"`` (planning,
            converting, running or reverting raised an exception) or ``"crashed"`` (its process died or took too long).
        error: The exception, if any.
        convs: 2D convolutions.
        convs_3x3: Those with a 3×3 kernel.
        converted: Convolutions converted.
        one_level: 3×3 convolutions that stay as they are because their map has room for one level only.
        left_alone: Numbers of other 3×3 convolutions left alone, by reason, as JSON.
        traced: How convolutions and map sizes were found.
        parameters_before: Parameters of the network.
        parameters_after: The same, converted.
        keys_before: Keys of its state dict.
        keys_after: The same, converted.
        same_state: Whether all keys and shapes are the same.
        outputs_before: Shapes of the outputs, as JSON; empty if the forward does not run.
        outputs_after: The same, converted.
        reverted: Whether every module has its class back in the end.
        seconds: Seconds for planning, converting and reverting.
        seconds_in_all: The same with building the network and running it twice.
    """

    name: str
    family: str
    status: str = CONVERTED
    error: str = ""
    convs: int = 0
    convs_3x3: int = 0
    converted: int = 0
    one_level: int = 0
    left_alone: str = "{}"
    traced: str = ""
    parameters_before: int = 0
    parameters_after: int = 0
    keys_before: int = 0
    keys_after: int = 0
    same_state: bool = False
    outputs_before: str = ""
    outputs_after: str = ""
    reverted: bool = False
    seconds: float = 0.0
    seconds_in_all: float = 0.0

    @classmethod
    def read(cls, record: dict[str, str]) -> "Row":
        """Read a row of a CSV file."""
        kinds: dict[str, Any] = {field.name: field.type for field in fields(cls)}
        return cls(**{name: _parse(text, kinds[name]) for name, text in record.items()})

    def record(self) -> dict[str, Any]:
        """The row for a CSV file."""
        return asdict(self)

    @property
    def sound(self) -> bool:
        """Whether the conversion kept all it promises to keep."""
        same = (self.parameters_before, self.outputs_before) == (self.parameters_after, self.outputs_after)
        return self.status == CONVERTED and same and self.same_state and self.reverted


def _parse(text: str, kind: type) -> Any:
    return text == "True" if kind is bool else kind(text)


def check(collection: Collection, name: str) -> Row:
    """Build a network, convert it, compare it with what it was, and revert it.

    Args:
        collection: The collection.
        name: The network.

    Returns:
        What happened, including any exception.
    """
    row = Row(name=name, family=collection.family(name))
    start = time.perf_counter()
    with warnings.catch_warnings(), _quiet_log():
        warnings.simplefilter("ignore")
        try:
            model, inputs = collection.build(name)
        except Exception as error:  # whatever a collection raises is its answer, and goes into the row
            row.status, row.error = NOT_BUILT, _message(error)
        else:
            try:
                _convert_and_compare(model, inputs, row)
            except Exception as error:  # a sweep is there to find these
                row.status, row.error = FAILED, _message(error) + _place(error)
    row.seconds_in_all = round(time.perf_counter() - start, 3)
    return row


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _convert_and_compare(model: nn.Module, inputs: Inputs, row: Row) -> None:
    classes, state = _classes(model), _state(model)
    row.parameters_before, row.keys_before = count_parameters(model), len(state)
    row.outputs_before = _outputs(model, inputs)
    start = time.perf_counter()
    plan = plan_conversion(model, example_inputs=inputs)
    _describe(plan, row)
    apply_plan(model, plan)
    row.seconds = time.perf_counter() - start
    row.parameters_after, row.keys_after = count_parameters(model), len(_state(model))
    row.same_state = _state(model) == state
    row.outputs_after = _outputs(model, inputs) if row.outputs_before else ""
    start = time.perf_counter()
    revert(model)
    row.seconds = round(row.seconds + time.perf_counter() - start, 3)
    row.reverted = _classes(model) == classes


def _describe(plan: Plan, row: Row) -> None:
    rows_3x3 = [each for each in plan.rows if each.signature.kernel_size == (3, 3)]
    row.convs, row.convs_3x3, row.converted = len(plan.rows), len(rows_3x3), len(plan.converted)
    row.traced = plan.traced
    reasons = plan.reasons(rows_3x3)
    row.one_level = reasons.pop(Reason.ONE_LEVEL.value, 0)
    row.left_alone = json.dumps(reasons, ensure_ascii=False)


def _outputs(model: nn.Module, inputs: Inputs) -> str:
    """Shapes of a network's outputs; empty where its forward needs numbers and it is on the meta device."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with torch.no_grad(), torch.device(device):
        try:
            # Such a call may change the network: it expects a copy, as the trace gives it.
            call = partial(inputs.call, Twin(model, fake=False).model) if inputs.call else model
            outputs = call(*inputs.args, **inputs.kwargs)
        except Exception:
            if device.type == "meta":
                return ""
            raise
    shapes = [list(leaf.shape) for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return json.dumps(shapes)


def _classes(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules()}


def _state(model: nn.Module) -> dict[str, torch.Size | None]:
    return {key: getattr(value, "shape", None) for key, value in model.state_dict().items()}


def _message(error: BaseException) -> str:
    """The error and its root cause, without folders and addresses."""
    root: BaseException = error
    while (deeper := root.__cause__ or root.__context__) is not None:
        root = deeper
    causes = [error] if root is error else [error, root]
    return ", for ".join(
        f"{type(cause).__name__}: {_PLACES.sub('…/', ' '.join(str(cause).split()))}"[:200] for cause in causes
    )


def _place(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f" (in {frame.name})"
