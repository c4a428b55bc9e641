"""Faults at every call into the package: what is done all or nothing is done, or leaves no trace."""

import sys
from pathlib import Path

import torch
import torch.fx as fx

import coconv_surgery

PACKAGE = str(Path(coconv_surgery.__file__).parent)
_COMPARED = (int, str, tuple, type(None), coconv_surgery.Plan)  # by value, all else by identity


def run_with_fault(action, number=None, error=KeyboardInterrupt):
    """Run an action, and raise at the n-th call of a function of the package, if there are so many.

    Returns:
        How many calls there were, and whether the error came out.
    """
    calls = 0

    def trace(frame, event, arg):
        nonlocal calls
        # Torch ends the process where the interpreter is interrupted while it asks a fake tensor for its device.
        dispatches = frame.f_code.co_name == "__torch_dispatch__"
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE) and not dispatches:
            calls += 1
            if calls == number:
                sys.settrace(None)
                raise error("a fault")
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
        return calls, False
    except error:
        return calls, True
    finally:
        sys.settrace(before)


def state(model):
    """Everything that a conversion or a load could change: classes, attributes, tensors and their numbers, code."""
    parts = {}
    for name, module in model.named_modules():
        attributes = {
            key: value if isinstance(value, _COMPARED) else id(value)
            for key, value in vars(module).items()
            if not key.startswith(("_in_spec", "_out_spec", "_lineno_map", "_code"))
        }
        attributes["meta"] = sorted(vars(module).get("meta", {})) if isinstance(module, fx.GraphModule) else None
        parts[name] = (type(module), attributes, module.code if isinstance(module, fx.GraphModule) else None)
    tensors = {
        name: (id(tensor), tensor.detach().clone(), tensor.requires_grad)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    return parts, tensors


def same_state(first, second):
    """Whether two states are the same."""
    (parts, tensors), (other_parts, other_tensors) = first, second
    return (
        parts == other_parts
        and tensors.keys() == other_tensors.keys()
        and all(
            a[0] == b[0] and a[2] == b[2] and torch.equal(a[1], b[1])
            for a, b in zip(tensors.values(), other_tensors.values(), strict=True)
        )
    )


def every_fault(build, action, error=KeyboardInterrupt, step=1):
    """Run an action on fresh subjects with a fault at each call in turn.

    Args:
        build: Makes a subject.
        action: Changes it.
        error: What is raised.
        step: Every how many calls.

    Returns:
        The number of faults. Any that leaves a subject half done is an AssertionError that names the call.
    """
    subject, number, faults = build(), 0, 0
    while True:
        number += step
        before = state(subject)
        calls, failed = run_with_fault(lambda subject=subject: action(subject), number, error)
        if calls < number:
            return faults
        faults += failed  # Python swallows one that comes while it closes a generator
        if not same_state(state(subject), before):
            # A fault on the very way out finds the work done; whether it is, doing it again shows.
            done = state(subject)
            action(subject)
            assert same_state(state(subject), done), f"half done after a fault at call {number}"
            subject = build()
