"""Nobody else sees planning: what others have put around it sees nothing of it, and random numbers stay in order."""

import contextlib
import functools
import logging
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.nn as nn
import torch.overrides
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes

# One at a time, because the twins of two threads may share what their networks' code reaches.
_TURN = threading.RLock()
_top_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # since torch 2.5
_OVERRIDES: Any = torch.overrides  # torch has no types for its stack of modes


@contextlib.contextmanager
def unseen(model: nn.Module) -> Iterator[None]:
    """Run a copy of a network inside, and nobody outside notices.

    Dispatch modes, function modes (except for the default device) and hooks on saved tensors are away, as is inference
    mode, which would hide the dataflow. The random generators of torch, Python and numpy are given back as they were.

    Args:
        model: The network, for the devices that it may draw random numbers on.
    """
    with ExitStack() as stack:
        stack.enter_context(_TURN)
        stack.enter_context(_disable_current_modes())
        stack.enter_context(_function_modes_away())
        if saves_by_hooks():
            stack.enter_context(saved_as_they_are())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(_nothing_compiled())
        for read, write in _generators(model):
            stack.callback(_restore, read, write, read())
        yield


def _nothing_compiled() -> AbstractContextManager[Any]:
    """Let code that is compiled when it runs, as branches of ``torch.cond`` are, run as it is written.

    Code that torch fails to compile, as it does under the modes that watch a run, is never compiled again, which eager
    ``torch.cond`` does not survive.
    """
    stance: Any = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    return contextlib.nullcontext() if stance is None else stance("force_eager")


@contextlib.contextmanager
def _function_modes_away() -> Iterator[None]:
    modes = [_OVERRIDES._pop_mode() for _ in range(_OVERRIDES._len_torch_function_stack())]
    # What is created without a device goes where it goes outside.
    kept = [mode for mode in modes if isinstance(mode, DeviceContext)]
    try:
        for mode in reversed(kept):
            _OVERRIDES._push_mode(mode)
        yield
    finally:
        for _ in kept:
            _OVERRIDES._pop_mode()
        for mode in reversed(modes):
            _OVERRIDES._push_mode(mode)


@contextlib.contextmanager
def without_logs() -> Iterator[None]:
    """Keep what this thread logs from everybody: torch does of what we raise or do without, and a network of its maps.

    A handler may keep what it is given, and tensors with it.
    """
    thread = threading.get_ident()

    def is_anothers(record: logging.LogRecord) -> bool:
        return record.thread != thread

    every: Any = logging  # whose list of all handlers has no type; some loggers, as mmengine's, are in no other
    handlers = [handler for held in every._handlerList if (handler := held()) is not None]
    for handler in handlers:
        handler.addFilter(is_anothers)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_anothers)


def saves_by_hooks() -> bool:
    """Whether somebody has put hooks on tensors that autograd saves, or may have."""
    return _top_hooks is None or _top_hooks(True) is not None


def saved_as_they_are() -> saved_tensors_hooks:
    """Let autograd save tensors as they are, whatever hooks lie further out."""
    # Detached, because an output that its own operation saves would never be freed.
    return saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)


def _generators(model: nn.Module) -> Iterator[tuple[Callable[[], Any], Callable[[Any], None]]]:
    """How to read and write the state of each random generator."""
    yield random.getstate, random.setstate
    yield torch.get_rng_state, torch.set_rng_state
    for device in {parameter.device for parameter in model.parameters() if parameter.is_cuda}:
        yield functools.partial(torch.cuda.get_rng_state, device), functools.partial(_set_cuda_state, device)
    numpy: Any = sys.modules.get("numpy")  # where nobody has imported it, nobody draws from it
    if numpy:
        yield numpy.random.get_state, numpy.random.set_state


def _set_cuda_state(device: torch.device, state: torch.Tensor) -> None:
    torch.cuda.set_rng_state(state, device)


def _restore(read: Callable[[], Any], write: Callable[[Any], None], before: Any) -> None:
    # Only what has moved, because another thread may be drawing.
    if not _same(read(), before):
        write(before)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return all(map(_same, one, other))
    return bool((one == other).all()) if hasattr(one, "all") else bool(one == other)
