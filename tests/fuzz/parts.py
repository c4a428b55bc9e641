"""The pieces of random networks: every one takes a batch of maps and returns one."""

import contextvars
import functools
import random
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import coconv_surgery as cs

# Convolutions, and what is done to them.


class InheritedConv2d(nn.Conv2d):
    """A class of its own with the forward of torch's."""


class HalvedConv2d(nn.Conv2d):
    def forward(self, input):
        return self._conv_forward(input, self.weight / 2, self.bias)


@cs.register_coconv
class CoHalvedConv2d(cs.CoConv2d, HalvedConv2d):
    def forward(self, input):
        return self._conv_forward(input, self.weight / 2, self.bias)


class UnknownConv2d(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + 1


def parametrized(conv, wrap):
    return wrap(conv)


class Tied(nn.Module):
    """Two convolutions of one weight."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second
        second.weight = first.weight

    def forward(self, x):
        return self.second(F.relu(self.first(x)))


class Twice(nn.Module):
    """One module, called twice, and known by two names if `aliased`."""

    def __init__(self, inner, aliased):
        super().__init__()
        self.inner = inner
        if aliased:
            self.again = inner

    def forward(self, x):
        return self.inner(F.relu(self.inner(x)))


class ByFunction(nn.Module):
    """Convolves with a convolution's weight, besides or instead of calling it."""

    def __init__(self, conv, also):
        super().__init__()
        self.conv, self.also = conv, also

    def forward(self, x):
        y = F.conv2d(x, self.conv.weight, self.conv.bias, padding=1)
        return y + self.conv(x) if self.also else y


# How parts are held together.


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Branches(nn.Module):
    def __init__(self, branches, how):
        super().__init__()
        self.branches, self.how = nn.ModuleList(branches), how

    def forward(self, x):
        outputs = [branch(x) for branch in self.branches]
        return torch.cat(outputs, 1) if self.how == "cat" else sum(outputs)


class Named(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, x):
        for part in self.parts.values():
            x = part(x)
        return x


class Warp(nn.Module):
    """Samples where a convolution tells it to."""

    def __init__(self, offset):
        super().__init__()
        self.offset = offset

    def forward(self, x):
        return F.grid_sample(x, self.offset(x).permute(0, 2, 3, 1).tanh(), align_corners=False)


class Gate(nn.Module):
    def __init__(self, squeeze, expand):
        super().__init__()
        self.squeeze, self.expand = squeeze, expand

    def forward(self, x):
        return x * self.expand(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()


# Control flow.


class OnTraining(nn.Module):
    def __init__(self, training, evaluation):
        super().__init__()
        self.in_training, self.in_evaluation = training, evaluation

    def forward(self, x):
        return self.in_training(x) if self.training else self.in_evaluation(x)


class OnShape(nn.Module):
    def __init__(self, large, small):
        super().__init__()
        self.large, self.small = large, small

    def forward(self, x):
        return self.large(x) if x.shape[-1] > 10 else self.small(x)


class OnNumbers(nn.Module):
    def __init__(self, positive, negative):
        super().__init__()
        self.positive, self.negative = positive, negative

    def forward(self, x):
        return self.positive(x) if x.mean() > 0.0123 else self.negative(x)


class Rescaled(nn.Module):
    """Leaves torch for a number."""

    def __init__(self, inner, way):
        super().__init__()
        self.inner, self.way = inner, way

    def forward(self, x):
        largest = x.detach().abs().max()
        scale = largest.item() if self.way == "item" else float(largest.numpy().max())
        return self.inner(x / max(scale, 1.0))


class Rejecting(nn.Module):
    """Has an exception of its own for what is no tensor."""

    class WrongInputError(Exception):
        pass

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        if type(x) is not torch.Tensor:
            raise self.WrongInputError(f"not a tensor but a {type(x).__name__}")
        return self.inner(x)


class Swallowing(nn.Module):
    """Catches whatever its inner part raises."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        try:
            return self.inner(x)
        except Exception:
            return x


# Randomness.


class Noisy(nn.Module):
    """Draws from every generator, and adds nothing of it in evaluation."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        noise = torch.rand(1, dtype=x.dtype) * random.random() * np.random.rand()
        return self.inner(x + (noise if self.training else 0 * noise))


# Caches of what depends on a map's size alone.


def make_grid(height, width):
    return torch.linspace(0, 1, height)[:, None] + torch.linspace(0, 1, width)


MODULE_CACHE: dict = {}


class DictCache(nn.Module):
    def forward(self, x):
        key = tuple(x.shape[-2:])
        if key not in MODULE_CACHE:
            MODULE_CACHE[key] = make_grid(*key)
        return x + MODULE_CACHE[key].to(x)


lru_grid = functools.lru_cache(maxsize=8)(make_grid)


class LruCache(nn.Module):
    def forward(self, x):
        return x + lru_grid(*x.shape[-2:]).to(x)


class ClassCache(nn.Module):
    grids: dict = {}  # noqa: RUF012

    def forward(self, x):
        key = str(tuple(x.shape[-2:]))
        if key not in self.grids:
            self.grids[key] = make_grid(*x.shape[-2:])
        return x + self.grids[key].to(x)


class ClassSlot(nn.Module):
    """Keeps the last one, on the class."""

    last = None

    def forward(self, x):
        if self.last is None or self.last.shape != x.shape[-2:]:
            type(self).last = make_grid(*x.shape[-2:])
        return x + self.last.to(x)


def make_remembering():
    grid = None

    def remembering(height, width):
        nonlocal grid
        if grid is None or grid.shape != (height, width):
            grid = make_grid(height, width)
        return grid

    return remembering


closure_grid = make_remembering()


class ClosureCache(nn.Module):
    def forward(self, x):
        return x + closure_grid(*x.shape[-2:]).to(x)


def default_grid(height, width, grids={}):  # noqa: B006
    if (height, width) not in grids:
        grids[height, width] = make_grid(height, width)
    return grids[height, width]


class DefaultCache(nn.Module):
    def forward(self, x):
        return x + default_grid(*x.shape[-2:]).to(x)


class Slots:
    __slots__ = ("grid",)

    def __init__(self):
        self.grid = None


SLOTS, LOCAL, CONTEXT, DEQUE = Slots(), threading.local(), contextvars.ContextVar("grid", default=None), deque(maxlen=2)


class SlotsCache(nn.Module):
    def forward(self, x):
        if SLOTS.grid is None or SLOTS.grid.shape != x.shape[-2:]:
            SLOTS.grid = make_grid(*x.shape[-2:])
        return x + SLOTS.grid.to(x)


class LocalCache(nn.Module):
    def forward(self, x):
        if getattr(LOCAL, "grid", None) is None or LOCAL.grid.shape != x.shape[-2:]:
            LOCAL.grid = make_grid(*x.shape[-2:])
        return x + LOCAL.grid.to(x)


class ContextCache(nn.Module):
    def forward(self, x):
        grid = CONTEXT.get()
        if grid is None or grid.shape != x.shape[-2:]:
            CONTEXT.set(grid := make_grid(*x.shape[-2:]))
        return x + grid.to(x)


class DequeCache(nn.Module):
    def forward(self, x):
        for grid in DEQUE:
            if grid.shape == x.shape[-2:]:
                return x + grid.to(x)
        DEQUE.append(make_grid(*x.shape[-2:]))
        return x + DEQUE[-1].to(x)


class MethodCache(nn.Module):
    """Remembers results by the module as well, and so the module."""

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def grid(self, height, width):
        return make_grid(height, width)

    def forward(self, x):
        return x + self.grid(*x.shape[-2:]).to(x)


def attribute_grid(height, width):
    if getattr(attribute_grid, "grid", None) is None or attribute_grid.grid.shape != (height, width):
        attribute_grid.grid = make_grid(height, width)
    return attribute_grid.grid


class AttributeCache(nn.Module):
    def forward(self, x):
        return x + attribute_grid(*x.shape[-2:]).to(x)


SEEN_MODULES: dict = {}


class ByModule(nn.Module):
    """Remembers by module, weakly or not, how often each has run."""

    def forward(self, x):
        SEEN_MODULES[self] = SEEN_MODULES.get(self, 0) + 1
        return x


class Registered(nn.Module):
    """Every copy adds itself to a list."""

    copies: list = []  # noqa: RUF012

    def __setstate__(self, state):
        super().__setstate__(state)
        self.copies.append(self)

    def forward(self, x):
        return x


class Rounded(torch.autograd.Function):
    """Rounds, with the gradient of what does not."""

    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Rounding(nn.Module):
    def forward(self, x):
        return Rounded.apply(x)


class Watching(nn.Module):
    """Counts the gradients that come through."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        if x.requires_grad:
            x = x * 1
            x.register_hook(self.see)
        return x

    def see(self, gradient):
        self.count += 1


class Differentiating(nn.Module):
    """Takes a gradient while it runs."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with torch.enable_grad():
            y = x.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(y.square().sum(), y)
        return self.inner(x + 0.1 * slope)


class Cast(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.inner(x)


class Offloading(nn.Module):
    """Keeps what the gradients need elsewhere."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with torch.autograd.graph.save_on_cpu():
            return self.inner(x)


class Seeding(nn.Module):
    """Seeds every generator, which is its own affair."""

    def forward(self, x):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        return x + 0.01 * torch.rand(1, dtype=x.dtype)


class WritingInput(nn.Module):
    """Adds to its input in place."""

    def forward(self, x):
        x += 1
        return x


class ByNumpy(nn.Module):
    def forward(self, x):
        return x + torch.from_numpy(np.sign(x.detach().numpy()).mean((2, 3), keepdims=True)).to(x)


class OwnCache(nn.Module):
    def __init__(self):
        super().__init__()
        self.grids = {}

    def forward(self, x):
        key = tuple(x.shape[-2:])
        if key not in self.grids:
            self.grids[key] = make_grid(*key)
        return x + self.grids[key].to(x)


class OwnSlot(nn.Module):
    def __init__(self):
        super().__init__()
        self.grid = None

    def forward(self, x):
        if self.grid is None or self.grid.shape != x.shape[-2:]:
            self.grid = make_grid(*x.shape[-2:])
        return x + self.grid.to(x)


class LazyBuffer(nn.Module):
    def forward(self, x):
        if not hasattr(self, "grid"):
            self.register_buffer("grid", make_grid(*x.shape[-2:]), persistent=False)
        return x + self.grid.to(x)


class SeenShapes(nn.Module):
    seen: list = []  # noqa: RUF012

    def forward(self, x):
        if tuple(x.shape) not in self.seen:
            self.seen.append(tuple(x.shape))
        return x


class KeptFeatures(nn.Module):
    """Keeps its last output where others may look, as feature extractors do."""

    last: list = []  # noqa: RUF012

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        self.last[:] = [self.inner(x)]
        return self.last[0]


class ClassCounter(nn.Module):
    count = 0

    def forward(self, x):
        type(self).count += 1
        return x


class OwnCounter(nn.Module):
    """Every other call is another."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        self.count += 1
        return x * (1 + self.count % 2)


class BufferCounter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return x / (1 + self.count)


def outside():
    """What the parts keep outside the networks, to compare."""
    tensors = {**MODULE_CACHE, **ClassCache.grids, **dict(enumerate(KeptFeatures.last))}
    closure = closure_grid.__closure__ or ()
    cells = [cell.cell_contents for cell in closure if not callable(cell.cell_contents)]
    held = [*tensors.values(), *default_grid.__defaults__[0].values(), *cells, ClassSlot.last, SLOTS.grid, *DEQUE]
    held += [getattr(LOCAL, "grid", None), CONTEXT.get(), getattr(attribute_grid, "grid", None), *Registered.copies]
    held += SEEN_MODULES
    keys = [*tensors, *default_grid.__defaults__[0], *SeenShapes.seen]
    # What a function's cache holds may be forgotten, and computed again.
    return [id(value) for value in held], list(map(repr, keys)), (ClassCounter.count, *SEEN_MODULES.values())


def forget():
    """Empty what the parts keep outside the networks."""
    containers = (MODULE_CACHE, ClassCache.grids, default_grid.__defaults__[0], SeenShapes.seen, KeptFeatures.last)
    for container in (*containers, DEQUE, SEEN_MODULES, Registered.copies):
        container.clear()
    SLOTS.grid = LOCAL.grid = attribute_grid.grid = None
    CONTEXT.set(None)
    MethodCache.grid.cache_clear()
    lru_grid.cache_clear()
    closure_grid(1, 1)
    ClassSlot.last, ClassCounter.count = None, 0


# Hooks, and attributes that hold more than tensors.


class Scaling:
    """A forward hook that changes the output."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, module, args, output):
        return output * self.factor


class FedByHook(nn.Module):
    """Reads what a hook on an inner part kept."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.kept = inner, []

        def keep(module, args, output):
            self.kept[:] = [output]

        hook = {"closure": keep, "method": self.keep, "partial": functools.partial(keep_in, self.kept)}[how]
        inner.register_forward_hook(hook)

    def keep(self, module, args, output):
        self.kept[:] = [output]

    def forward(self, x):
        self.inner(x)
        return F.relu(self.kept.pop())


def keep_in(kept, module, args, output):
    kept[:] = [output]


def hooked(inner, factor):
    inner.register_forward_hook(Scaling(factor))
    return inner


def prehooked(inner):
    inner.register_forward_pre_hook(shift)
    return inner


def shift(module, args):
    return (args[0] + 1, *args[1:])


class Holding(nn.Module):
    """Calls its inner part by an attribute that is no module."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how
        if how == "lambda":
            self.run = lambda x: self.inner(x)
        elif how == "method":
            self.run = self.call
        elif how == "forward":
            self.run = inner.forward
        else:
            self.run = functools.partial(call_module, inner)

    def call(self, x):
        return self.inner(x)

    def forward(self, x):
        return self.run(x)


def call_module(module, x):
    return module(x)


class Locked(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.lock = inner, threading.Lock()

    def forward(self, x):
        with self.lock:
            return self.inner(x)


def replaced(inner, times):
    """A part whose forward was replaced on the instance."""
    plain = inner.forward

    def forward(x):
        return plain(x) * times

    inner.forward = forward
    return inner


class Teacher(nn.Module):
    """Is shared by all copies."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        return self.inner(x)


class Writing(nn.Module):
    """Moves its parameters while it runs."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with torch.no_grad():
            for parameter in self.inner.parameters():
                parameter.mul_(0.999)
        return self.inner(x)


class Property(nn.Module):
    """A property that raises, and one that counts how often it is read."""

    reads = 0

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @property
    def weight(self):
        type(self).reads += 1
        raise RuntimeError("has no weight")

    def forward(self, x):
        return self.inner(x)


# Gradients.

GRADIENTS = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "off": functools.partial(torch.set_grad_enabled, False),
    "on": torch.enable_grad,
}


class Switched(nn.Module):
    """Runs with gradients switched off or on."""

    def __init__(self, inner, mode):
        super().__init__()
        self.inner, self.mode = inner, mode

    def forward(self, x):
        with GRADIENTS[self.mode]():
            x = self.inner(x)
        return x.clone()


class Decorated(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @torch.no_grad()
    def forward(self, x):
        return self.inner(x)


class Detached(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.detach())


class Checkpointed(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


# Graphs.


def traced(inner):
    return fx.symbolic_trace(inner)


def exported(inner, shape, decomposed):
    for module in inner.modules():
        module.training = False
    program = torch.export.export(inner, (torch.randn(shape),))
    return (program.run_decompositions() if decomposed else program).module()


UNGRAPHED = {traced: lambda inner: inner, exported: lambda inner, *_: inner}
OPEN = {
    Switched: lambda inner, mode: Switched(inner, "on"),
    Decorated: lambda inner: Switched(inner, "on"),
    Checkpointed: lambda inner, reentrant: Switched(inner, "on"),
}


# Whole networks.


class Record:
    """A plain object that holds tensors."""

    def __init__(self, output, maps):
        self.output, self.maps = output, maps


@dataclass
class Fields:
    output: Any
    maps: Any


class Tuple(NamedTuple):
    output: Any
    maps: Any


OUTPUTS = {
    "tensor": lambda output, maps: output,
    "tuple": lambda output, maps: (output, maps),
    "list": lambda output, maps: [*maps, output],
    "dict": lambda output, maps: {"output": output, "maps": dict(enumerate(maps))},
    "dataclass": Fields,
    "namedtuple": Tuple,
    "object": Record,
}


class Network(nn.Module):
    """Parts in a row, then a head."""

    def __init__(self, parts, head, outputs):
        super().__init__()
        self.parts, self.head, self.outputs = nn.ModuleList(parts), head, outputs

    def forward(self, x):
        maps = []
        for part in self.parts:
            x = part(x)
            maps.append(F.relu(x))
        return OUTPUTS[self.outputs](self.head(x), maps)


class Dense(nn.Module):
    """A prediction for every place."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction = prediction

    def forward(self, x):
        return self.prediction(F.relu(x))


class Pooled(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(F.relu(x).mean((2, 3)))


def tensors(value):
    """All tensors in what a network returns."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for entry in value.values() for tensor in tensors(entry)]
    if isinstance(value, list | tuple):
        return [tensor for entry in value for tensor in tensors(entry)]
    return tensors(vars(value))
