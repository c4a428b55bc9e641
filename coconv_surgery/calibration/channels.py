"""Which channels of a network can change places without a change in what it computes.

The channels of a feature map mean whatever the weights around them make of them: whoever permutes the rows of the
weights that write a map, the entries of its norms, and the columns of the weights that read it, has the same network.
Maps that are added share their order, as all those along a residual path do.

Forward passes are watched operation by operation. What is not known to treat all channels alike pins the channels of
everything that goes in: they stay where they are.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch.utils.weak import WeakIdKeyDictionary

from coconv_surgery.calibration.networks import tensors_of
from coconv_surgery.tracing.objects import tensor_leaves, tensors_in
from coconv_surgery.tracing.operations import Leaving, Operations

aten: Any = torch.ops.aten
_WeakDict: Any = WeakIdKeyDictionary  # torch has no types for it


@dataclass(frozen=True)
class Side:
    """One dimension of a parameter or buffer.

    Attributes:
        name: Its qualified name.
        dim: The dimension.
    """

    name: str
    dim: int


@dataclass
class Order:
    """Channels that change places together, if at all.

    Attributes:
        sides: The dimensions that they run along.
        scales: What a norm multiplies each channel of a convolution's output with, by the name of its weight.
    """

    sides: set[Side] = field(default_factory=set)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)


def find_orders(
    model: nn.Module, run: Callable[[], Iterable[Any]], train: Callable[[], Any] | None = None
) -> tuple[list[Order], set[str]]:
    """Find the channels of a network that can change places.

    Args:
        model: The network, in evaluation mode; its convolutions are plain.
        run: Runs it, and gives what it returns.
        train: Runs it as it is in training, if some of it has not run. It may fail.

    Returns:
        One order for each set of channels that is free: none that something reads in training alone, nor any that are
        as many as those of what did not run in evaluation. And the names of weights that did not run in training
        either, of which it is not known which channels they read.
    """
    watch = _Watch(model)
    with torch.no_grad(), Operations(watch.see), Leaving(watch.pin):
        for outputs in run():
            watch.pin(tensors_in(outputs))
            del outputs
            watch.pin_what_is_kept()
    if train is not None and watch.has_late_parts():
        with torch.no_grad(), Operations(watch.see), contextlib.suppress(Exception):
            train()
    return watch.free(), watch.unread()


class _Watch:
    """Follows channels through a forward pass. A group is a set of channels in one order, by number; 0 is pinned."""

    def __init__(self, model: nn.Module) -> None:
        self._names: Any = _WeakDict()
        self._sizes: dict[str, torch.Size] = {}
        persistent = model.state_dict().keys()  # another buffer would not find its way into a file
        for name, tensor in tensors_of(model).items():
            self._sizes[name] = tensor.shape
            if name in persistent:
                self._names[tensor] = name
        self._maps: Any = _WeakDict()  # the group along dimension 1 of a feature map
        self._outputs: Any = _WeakDict()  # of convolutions: the names of their weights
        self._transposed: Any = _WeakDict()  # matrices, whose columns are their weights' rows
        self._seen: set[str] = set()  # names of what operations took in evaluation mode
        self._late: set[str] = set()  # names of what none took there
        self._trained: set[str] = set()  # names of what they took in training, if it was run
        self._sides: dict[Side, int] = {}
        self._read: set[Side] = set()  # those that channels are read along
        self._scales: dict[str, torch.Tensor | None] = {}
        self._parents = [0]

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Follow the channels through an operation that has run."""
        operation = getattr(func, "overloadpacket", func)
        if operation in _NOT_READ:
            return
        inputs = tensor_leaves((args, kwargs))
        names = {name for tensor in inputs if (name := self._names.get(tensor)) is not None}
        (self._trained if self._late else self._seen).update(names)
        if names & self._late:
            self.pin(inputs)
            return
        if operation is aten.convolution and self._convolution(*args, result):
            return
        if operation in _NORMS and self._norm(args, result):
            return
        if operation is aten.addmm and self._linear(*args[:3]):
            return
        if operation is aten.t and args[0] in self._names:
            self._transposed[result] = self._names[args[0]]
            return
        outputs = tensor_leaves(result)
        if len(inputs) == len(outputs) == 1 and inputs[0] in self._names and _is_whole(outputs[0], inputs[0]):
            self._names[outputs[0]] = self._names[inputs[0]]
            return
        maps = [tensor for tensor in inputs if tensor.numel() > 1]
        if _keeps_channels(operation, args, maps, outputs) and all(tensor in self._maps for tensor in maps):
            groups = [self._maps[tensor] for tensor in maps]
            for group in groups[1:]:
                self._join(group, groups[0])
            for tensor in outputs:
                self._maps[tensor] = groups[0]
            return
        # Whatever is not known to treat all channels alike.
        self.pin(inputs)

    def has_late_parts(self) -> bool:
        """Whether there is something that no operation took; from here on it pins what it reads."""
        self._late = {name for name in self._names.values() if self._sizes[name] and name not in self._seen}
        return bool(self._late)

    def unread(self) -> set[str]:
        """The names of weights that no operation took, so that nobody knows what they read."""
        return {name for name in self._late - self._trained if len(self._sizes[name]) > 1}

    def pin(self, tensors: Iterable[Any]) -> None:
        """Let the channels of maps and weights stay where they are."""
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor in self._maps:
                self._join(self._maps[tensor], 0)
            if (name := self._names.get(tensor) or self._transposed.get(tensor)) is not None:
                for dim in range(tensor.dim()):
                    self._join(self._side(name, dim), 0)

    def pin_what_is_kept(self) -> None:
        """Pin all maps that are still there when a run has ended: somebody keeps them, and may read them."""
        self.pin(list(self._maps.keys()))

    def free(self) -> list[Order]:
        """The groups that nothing has pinned, that something is known to read, and nothing else may.

        What took no part in a run in evaluation mode, such as a branch for training alone or an average of the weights,
        may read or follow any channels that are as many.
        """
        unseen = {side for name, sizes in self._sizes.items() if name not in self._seen for side in sizes}
        orders: dict[int, Order] = {}
        for side, group in self._sides.items():
            if root := self._root(group):
                orders.setdefault(root, Order()).sides.add(side)
        read = [order for order in orders.values() if order.sides & self._read and self._size(order) not in unseen]
        for order in read:
            names = {side.name for side in order.sides if side.dim == 0}
            order.scales = {name: scale for name in names if (scale := self._scales.get(name)) is not None}
        return read

    def _size(self, order: Order) -> int:
        side = next(iter(order.sides))
        return self._sizes[side.name][side.dim]

    def _convolution(self, input: Any, weight: Any, bias: Any, *rest: Any) -> bool:
        *_, transposed, _, groups, result = rest
        if weight not in self._names or (bias is not None and bias not in self._names) or input.dim() != 4:
            return False
        name = self._names[weight]
        channels = input.shape[1]
        if groups == 1:
            written, read = (1, 0) if transposed else (0, 1)
            self._join(self._side(name, read), self._maps.get(input, 0))
            self._read.add(Side(name, read))
            group = self._side(name, written)
        elif groups == channels == weight.shape[0] and not transposed and weight.shape[1] == 1:
            group = self._side(name, 0)
            self._join(group, self._maps.get(input, 0))
        else:
            return False
        if bias is not None:
            self._join(group, self._side(self._names[bias], 0))
        self._maps[result] = group
        self._outputs[result] = name
        return True

    def _norm(self, args: tuple[Any, ...], result: Any) -> bool:
        (input, weight, bias, mean, variance), eps = args[:5], args[-1]
        parts = [tensor for tensor in (weight, bias, mean, variance) if tensor is not None]
        if input not in self._maps or any(part not in self._names for part in parts):
            return False
        group = self._maps[input]
        for part in parts:
            self._join(group, self._side(self._names[part], 0))
        self._maps[result[0]] = group
        if (conv := self._outputs.get(input)) is not None and variance is not None:
            scale = (variance + eps).rsqrt() * (1 if weight is None else weight)
            known = self._scales.setdefault(conv, scale)
            if known is not None and not torch.equal(known, scale):
                self._scales[conv] = None  # two norms
        return True

    def _linear(self, bias: Any, input: Any, matrix: Any) -> bool:
        if input not in self._maps or matrix not in self._transposed or bias not in self._names:
            return False
        name = self._transposed[matrix]
        self._join(self._side(name, 1), self._maps[input])
        self._read.add(Side(name, 1))
        for side in (self._side(name, 0), self._side(self._names[bias], 0)):
            self._join(side, 0)
        return True

    def _side(self, name: str, dim: int) -> int:
        if Side(name, dim) not in self._sides:
            self._sides[Side(name, dim)] = len(self._parents)
            self._parents.append(len(self._parents))
        return self._sides[Side(name, dim)]

    def _root(self, group: int) -> int:
        while self._parents[group] != group:
            group = self._parents[group]
        return group

    def _join(self, one: int, other: int) -> None:
        low, high = sorted((self._root(one), self._root(other)))
        self._parents[high] = low


# What reads no numbers.
_NOT_READ = (aten.sym_size, aten.size, aten.numel, aten.is_pinned)
_NORMS = (
    aten.native_batch_norm,
    aten._native_batch_norm_legit_no_training,
    aten.cudnn_batch_norm,
    aten.miopen_batch_norm,
)
# One number for each, from the numbers in its place.
_ELEMENTWISE = {
    *(aten.add, aten.add_, aten.sub, aten.sub_, aten.mul, aten.mul_, aten.div, aten.div_, aten.neg, aten.abs),
    *(aten.maximum, aten.minimum, aten.clamp, aten.clamp_, aten.clamp_min, aten.clamp_min_, aten.clamp_max),
    *(aten.relu, aten.relu_, aten.leaky_relu, aten.leaky_relu_, aten.elu, aten.elu_, aten.gelu, aten.silu, aten.silu_),
    *(aten.mish, aten.mish_, aten.hardtanh, aten.hardtanh_, aten.hardswish, aten.hardswish_, aten.hardsigmoid),
    *(aten.hardsigmoid_, aten.sigmoid, aten.sigmoid_, aten.tanh, aten.tanh_, aten.softplus, aten.exp, aten.sqrt),
    *(aten.pow, aten.square, aten.clone, aten._to_copy, aten.detach, aten.alias, aten.contiguous),
}
# One map for each channel, from that channel.
_SPATIAL = {
    *(aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d),
    *(aten.upsample_nearest2d, aten._upsample_nearest_exact2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d),
    *(aten.reflection_pad2d, aten.replication_pad2d),
}
_RESHAPES = {aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias}


def _is_whole(view: Any, tensor: Any) -> bool:
    """Whether a view is of all of a tensor, as it is."""
    same = (view.shape, view.stride(), view.data_ptr()) == (tensor.shape, tensor.stride(), tensor.data_ptr())
    return bool(same)


def _keeps_channels(operation: Any, args: tuple[Any, ...], maps: list[Any], outputs: list[Any]) -> bool:
    """Whether an operation treats all channels of its maps alike, and gives them in the order of its input."""
    if not maps or not outputs or any(tensor.dim() < 2 for tensor in (*maps, *outputs)):
        return False
    if len({tensor.shape[1] for tensor in (*maps, *outputs)}) > 1:
        return False
    if operation is aten.cat and len(maps) == 1:
        return True
    if operation in _ELEMENTWISE:
        return len({tensor.dim() for tensor in maps}) == 1
    if operation in _SPATIAL:
        return bool(maps[0].dim() == 4)
    if operation is aten.constant_pad_nd:
        return bool(len(args[1]) <= 2 * (maps[0].dim() - 2))
    if operation is aten.mean:
        dims = {dim % maps[0].dim() for dim in (args[1] or ())} if len(args) > 1 else set()
        return bool(dims) and not dims & {0, 1}
    if operation in _RESHAPES:
        return all(tensor.shape[:2].numel() == tensor.numel() for tensor in (maps[0], outputs[0]))
    return False
