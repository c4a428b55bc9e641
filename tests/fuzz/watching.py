"""What a network and the process are, to compare before and after; and what an independent network computes."""

import contextlib
import gc
import random
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import faults
import numpy as np
import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F
from reference import naive_coconv2d
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d, pad_same
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import coconv_surgery as cs
from fuzz.parts import Holding, OwnCounter, outside


def check(holds: bool, fact: str) -> None:
    """Fail with a fact that does not hold."""
    if not holds:
        raise AssertionError(fact)


class Counting:
    """A hook that only counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *args: Any) -> None:
        self.count += 1


def named_tensors(net: nn.Module) -> dict[str, torch.Tensor]:
    return dict((*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)))


def deep_state(net: nn.Module) -> dict[str, Any]:
    """Everything that planning must leave as it is, by what it is called."""
    parts, tensors = faults.state(net)
    contents = {
        (name, key): _content(value)
        for name, module in net.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, dict | list | set) and not key.startswith(("_in_spec", "_out_spec", "_lineno_map"))
    }
    held = named_tensors(net)
    return {
        "modules": parts,
        "contents of attributes": contents,
        "tensors": {name: (entry[0], entry[2]) for name, entry in tensors.items()},
        "numbers": Numbers([entry[1] for entry in tensors.values()]),
        "tensors' versions": {name: None if t.is_inference() else t._version for name, t in held.items()},
        "gradients": {name: id(p.grad) for name, p in net.named_parameters() if p.grad is not None},
        "gradients' numbers": Numbers([p.grad.clone() for p in net.parameters() if p.grad is not None]),
    }


def _content(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [(str(key), id(entry)) for key, entry in value.items()]
    return list(map(id, value))


class Numbers(list):
    """Tensors that compare by their numbers, to the bit."""

    def __eq__(self, other: object) -> bool:
        return len(self) == len(other) and all(map(same, self, other))

    __hash__ = None


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are the same to the bit, NaN included."""
    equal = (first == second) | ((first != first) & (second != second))
    return first.shape == second.shape and first.dtype == second.dtype and bool(equal.all())


def process_state() -> dict[str, Any]:
    """What the process has that planning and surgery must leave as it is."""
    return {
        "torch's random state": Numbers([torch.get_rng_state()]),
        "Python's random state": random.getstate(),
        "numpy's random state": repr(np.random.get_state()),
        "gradient mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "mode stacks": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "patched functions": [
            id(function)
            for function in (nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__, F.conv2d, torch.conv2d)
        ],
        "state outside the network": outside(),
        "global hooks": (
            len(nn.modules.module._global_forward_hooks),
            len(nn.modules.module._global_forward_pre_hooks),
        ),
        "default type": (torch.get_default_dtype(), torch.get_default_device()),
    }


@contextlib.contextmanager
def unchanged(what: str, *nets: nn.Module) -> Iterator[None]:
    """See to it that nothing of some networks or of the process changes."""
    before = [process_state(), *map(deep_state, nets)]
    try:
        yield
    finally:
        for old, new in zip(before, (process_state(), *map(deep_state, nets)), strict=True):
            for name, value in old.items():
                check(value == new[name], f"{what} changed {name}")


@contextlib.contextmanager
def only_classes_change(what: str, net: nn.Module) -> Iterator[None]:
    """See to it that a network's tensors, hooks and flags stay what they are, and so does the process."""
    with unchanged(what):
        before = deep_state(net)
        hooks = _hooks(net)
        yield
        after = deep_state(net)
        for name in ("tensors", "numbers", "tensors' versions", "gradients", "gradients' numbers"):
            check(before[name] == after[name], f"{what} changed {name}")
        check(_hooks(net) == hooks, f"{what} changed hooks or flags")


def _hooks(net: nn.Module) -> list[Any]:
    tables = [
        (module, table) for module in net.modules() for table in (module._forward_hooks, module._forward_pre_hooks)
    ]
    return [(module.training, [(key, id(hook)) for key, hook in table.items()]) for module, table in tables]


SURVIVORS = {"tensors survive": FakeTensor, "proxies survive": fx.Proxy, "modules survive": nn.Module}


@contextlib.contextmanager
def no_survivors(what: str, kinds: tuple[type, ...]) -> Iterator[None]:
    """See to it that nothing made meanwhile is alive afterwards that only planning makes."""
    gc.collect()
    before = _suspects(kinds)
    yield
    gc.collect()
    after = _suspects(kinds)
    alive = [value for key, value in after.items() if key not in before]
    names = {type(value).__name__ for value in alive}
    del alive, after
    check(not names, f"survives {what}: {', '.join(sorted(names))}")


def _suspects(kinds: tuple[type, ...]) -> dict[int, Any]:
    return {id(value): value for value in gc.get_objects() if issubclass(type(value), kinds)}


class CountingFunctions(TorchFunctionMode):
    def __init__(self, count: Counting) -> None:
        super().__init__()
        self.counting = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counting()
        return func(*args, **(kwargs or {}))


class CountingDispatches(TorchDispatchMode):
    def __init__(self, count: Counting) -> None:
        super().__init__()
        self.counting = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counting()
        return func(*args, **(kwargs or {}))


AROUND = ("nothing", "forward hook", "forward pre-hook", "functions", "dispatches", "saved tensors")


@contextlib.contextmanager
def unseen(around: str) -> Iterator[None]:
    """See to it that others who watch the whole process are told nothing."""
    seen = Counting()
    with contextlib.ExitStack() as stack:
        if around == "forward hook":
            stack.callback(nn.modules.module.register_module_forward_hook(seen).remove)
        elif around == "forward pre-hook":
            stack.callback(nn.modules.module.register_module_forward_pre_hook(seen).remove)
        elif around == "functions":
            stack.enter_context(CountingFunctions(seen))
        elif around == "dispatches":
            stack.enter_context(CountingDispatches(seen))
        elif around == "saved tensors":
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: (seen(), t)[1], lambda t: t))
        yield
        count = seen.count
    check(not count, f"planning is seen by: {around}")


def seed_all(seed: int = 0) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def copy_numbers(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers by name, and what else the outputs depend on."""
    own = named_tensors(target)
    counters = [[m for m in net.modules() if isinstance(m, OwnCounter)] for net in (source, target)]
    for one, other in zip(*counters, strict=False):
        other.count = one.count
    with torch.no_grad():
        for name, tensor in named_tensors(source).items():
            if name in own:
                own[name].data = own[name].data.to(tensor.dtype)
                own[name].data.copy_(tensor.data)


# What a convolution in a graph is named by.
_OF_WEIGHT = re.compile(r"(\.parametrizations)?\.weight(\.original\d?)?$")


def equip(control: nn.Module, levels: Mapping[str, tuple[Any, Any] | None]) -> None:
    """Let the convolutions of a network that was never converted compute naively what levels say.

    Args:
        control: The network.
        levels: Dilations and channels by name, None for the plain convolution.
    """
    for name, own in levels.items():
        conv = control.get_submodule(_OF_WEIGHT.sub("", name))
        if not isinstance(conv, nn.Conv2d):
            continue
        if own is None and not isinstance(conv, cs.CoConv2d):
            vars(conv).pop("_conv_forward", None)
            if isinstance(vars(conv).get("forward"), partial):
                del conv.forward
            continue
        dilations, splits = own or ((conv.dilation,), (conv.out_channels,))
        conv._conv_forward = partial(_naive, conv, dilations, splits)
        if isinstance(conv, StdConv2d | ScaledStdConv2d | Conv2dSame):
            conv.forward = partial(_naive_timm, conv)
    for module in control.modules():
        if isinstance(module, Holding) and module.how == "forward":
            module.run = module.inner.forward


def _naive(conv: nn.Conv2d, dilations: Any, splits: Any, input: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
    arguments = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return naive_coconv2d(
        input, weight, bias, *arguments, dilations=dilations, splits=splits, padding_mode=conv.padding_mode
    )


def _naive_timm(conv: nn.Conv2d, input: torch.Tensor) -> torch.Tensor:
    weight = conv.weight
    if isinstance(conv, Conv2dSame):
        input = pad_same(input, conv.kernel_size, conv.stride, conv.dilation)
    else:
        rows = weight.flatten(1)
        rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, unbiased=False, keepdim=True) + conv.eps).sqrt()
        weight = rows.view_as(weight)
        if isinstance(conv, ScaledStdConv2d):
            weight = weight * conv.gain * conv.scale
    return conv._conv_forward(input, weight, conv.bias)
