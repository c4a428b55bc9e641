"""Copies of a network that leave nothing behind, wherever the network's code puts things."""

import contextlib
import contextvars
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn as nn

from coconv_surgery.tracing import leftovers
from coconv_surgery.tracing.inputs import Inputs
from coconv_surgery.tracing.surroundings import Surroundings
from coconv_surgery.tracing.twin import NetworkError, Twin

_Result = TypeVar("_Result")


class Visit:
    """Makes twins of a network. When it ends nothing of them is left, and all around them is as it was.

    Args:
        model: The network.
        inputs: What it is to be called with.

    Attributes:
        model (nn.Module): The network.
        error (NetworkError | None): Why the network does not run, if so.

    Raises:
        ValueError: At the end, if somebody keeps a part of a twin, or a tensor of it, and cannot be made to let go.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model = model
        self.error: NetworkError | None = None
        self._surroundings = Surroundings(model, *([inputs.call] if inputs.call else []))
        # Operations on single numbers are computed even where tensors have no data.
        self._surroundings.keep_buffers(of_at_most=1)
        self._twins: list[Twin] = []

    def twin(self, *, fake: bool = True) -> Twin:
        """A new twin of the network, with tensors that have no data or with real ones.

        It finds everything around it as the network does, whatever an earlier one has left there.
        """
        if self._twins:
            self._surroundings.put_back()
            self._surroundings.empty_caches()
        if not fake:
            self._surroundings.keep_buffers()
        self._twins.append(Twin(self.model, self._surroundings, fake=fake))
        return self._twins[-1]

    def __enter__(self) -> "Visit":
        self._surroundings.empty_caches()
        return self

    def __exit__(self, raised: type[BaseException] | None, *_: object) -> None:
        torch.clear_autocast_cache()  # which has casts of the twins' weights
        self._surroundings.put_back()
        traces = [trace for twin in self._twins for trace in twin.traces()]
        if self.error is not None:
            self.error.clear_frames()
        while self._twins:
            self._twins.pop().take_apart()
        if raised is None:
            self._let_go(traces)

    def _let_go(self, traces: list[weakref.ref[Any]]) -> None:
        # Most is gone at once; the rest is garbage, and mostly young; what is not, somebody keeps.
        young, take_out = functools.partial(gc.collect, 1), functools.partial(leftovers.take_out, traces)
        for step in (young, gc.collect, take_out, gc.collect):
            if not leftovers.alive(traces):
                return
            step()
        if leftovers.alive(traces) and self.error is None:
            holder = leftovers.delete_attributes(traces)
            raise ValueError(
                f"{type(self.model).__name__} keeps what planning computed in {holder}, where it cannot be told what "
                "there was before: the network may return it, or miss an attribute that is deleted now. Make anew what "
                "it keeps there, and let planning run with numbers, example_inputs=Inputs(..., needs_numbers=True), or "
                "plan another instance and apply_plan() that"
            )


@contextlib.contextmanager
def garbage_stays() -> Iterator[None]:
    """Garbage is not collected by itself, so that all that a visit makes stays young.

    When it ends, that is then collected without a look at all the objects of the process.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def on_a_copy(model: nn.Module, inputs: Inputs, work: Callable[[nn.Module], _Result]) -> _Result:
    """Do some work on a copy of a network that computes numbers, and leave nothing of it but what the work gives.

    Args:
        model: The network.
        inputs: What the copy is to be called with.
        work: A function of the copy.
    """
    with Visit(model, inputs) as visit:
        return contextvars.copy_context().run(work, visit.twin(fake=False).model)
