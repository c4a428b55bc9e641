"""What a network is run on: images, in whatever form the user has them."""

import copy
import inspect
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves, tree_map

from coconv_surgery.calibration.report import CalibrationError
from coconv_surgery.layers.arguments import is_instance_of, kind
from coconv_surgery.tracing.inputs import Inputs
from coconv_surgery.tracing.objects import tensor_leaves

BATCH = 16
_MOST_EMPTY = 1000  # batches, of a stream that may have no end
_SHOWN = 3


class Stop(BaseException):
    """What is left of a run is not needed. Not an Exception, so that no code of a network catches it."""


@dataclass(frozen=True)
class Batch:
    """One call of a network.

    Attributes:
        args: Inputs by position.
        kwargs: Inputs by name.
        images: How many images are in it.
        call: What is called instead of the network, with that before the inputs.
        left_out: How many inputs were taken for labels that the network would have taken, too.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    images: int
    call: Callable[..., Any] | None = None
    left_out: int = 0

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors among its inputs."""
        return tensor_leaves((self.args, self.kwargs))

    @property
    def is_empty(self) -> bool:
        """Whether there are no images in it because it is a batch of none."""
        return any(tensor.dim() >= 4 and not len(tensor) for tensor in self.tensors)

    def run(self, model: nn.Module) -> Any:
        """Run a network on a copy of it."""
        return Inputs(self.args, self.kwargs, self.call).run(model)


def read_batches(model: nn.Module, images: Any, limit: int) -> list[Batch]:
    """Read as many images as are wanted, once.

    Args:
        model: A copy of the network, for a callable to run.
        images: As of :func:`~coconv_surgery.calibrate`.
        limit: How many images at most; a batch is taken whole.

    Raises:
        TypeError: If it is nothing that could be images.
        CalibrationError: If there are none, something else is among them, or they hold numbers that are not finite.
    """
    if isinstance(images, torch.Tensor):
        images = torch.split(images[:limit], BATCH) if images.dim() == 4 and _is_dense(images) else [images]
    if isinstance(images, Inputs):
        images = [images]
    refused = isinstance(images, nn.Module | type | str | bytes | Mapping | io.IOBase)
    several = None if refused else _iterator(images)
    if several is None and (refused or not callable(images)):
        raise TypeError(
            "images must be a tensor (N, C, H, W), an iterable of what the network takes, or a function that runs the "
            f"network that it is given, not {kind(images)}"
        )
    batches: list[Batch] = [] if several is not None else _captured(model, images, limit)
    for item in several or ():
        batches.append(_batch(model, item))
        if _are_enough(batches, limit):
            break
    for number, batch in enumerate(batches):
        _check(batch, f"batch {number} of the images")
    filled = [batch for batch in batches if batch.images]
    if not filled:
        raise CalibrationError(
            "there are no images to calibrate on"
            + (": the function must call the network that it is given" if several is None else "")
        )
    return filled


def _are_enough(batches: Sequence[Batch], limit: int) -> bool:
    """Whether nothing more is to be read, also because no images come of it."""
    images = [batch.images for batch in batches]
    return sum(images) >= limit or images.count(0) >= _MOST_EMPTY or not (images[-1] or batches[-1].is_empty)


def _check(batch: Batch, name: str) -> None:
    tensors = batch.tensors
    for tensor in tensors:
        if not _is_dense(tensor):
            raise CalibrationError(
                f"{name} holds a tensor of layout {tensor.layout} on {tensor.device}: give dense tensors with numbers"
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CalibrationError(f"{name} holds numbers that are not finite")
    if not batch.images and not batch.is_empty:
        leaves = tree_leaves((batch.args, batch.kwargs))
        given = ", ".join(map(_in_words, leaves[:_SHOWN])) + (", …" if len(leaves) > _SHOWN else "")
        raise CalibrationError(
            f"{name} holds no images, which are tensors (N, C, H, W), or (C, H, W), but {given or 'nothing'}: give "
            "what the network takes in evaluation, labels behind the images"
        )


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor has numbers that can be read one by one."""
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_nested


def _in_words(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return kind(value)
    return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"


def _iterator(images: Any) -> Iterator[Any] | None:
    try:
        several: Iterator[Any] = iter(images)
        return several
    except TypeError:
        return None


def _captured(model: nn.Module, run: Callable[[nn.Module], Any], limit: int) -> list[Batch]:
    """What a function calls the network with."""
    batches: list[Batch] = []

    def capture(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        args, kwargs = copy.deepcopy(tree_map(_apart, (args, kwargs)))
        batches.append(Batch(args, kwargs, _count(args, kwargs)))
        if _are_enough(batches, limit):
            raise Stop

    handle = model.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        with torch.no_grad():
            run(model)
    except Stop:
        pass
    finally:
        handle.remove()
    return batches


def _batch(model: nn.Module, item: Any) -> Batch:
    call, left_out = None, 0
    if isinstance(item, Inputs):
        args, kwargs, call = tuple(item.args), dict(item.kwargs), item.call
    elif is_instance_of(model, "mmengine.model.base_model.base_model", "BaseModel"):
        args, kwargs, call = (item,), {}, _call_of_mmengine
    elif isinstance(item, Mapping):
        args, kwargs = (), dict(item)
    elif isinstance(item, tuple | list):
        (args, left_out), kwargs = _as_many_as_it_needs(model, tuple(item)), {}
    else:
        args, kwargs = (item,), {}
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def enter(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not _is_dense(value):
            return value
        return value.detach().to(parameter.device, parameter.dtype if value.is_floating_point() else value.dtype)

    if call is not _call_of_mmengine:
        args, kwargs = tree_map(enter, args), tree_map(enter, kwargs)
    return Batch(args, kwargs, _count(args, kwargs), call, left_out)


def _as_many_as_it_needs(model: nn.Module, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], int]:
    """Inputs without labels behind them, which a loader gives and the network does not need.

    Returns:
        The inputs, and how many others the network would have taken.
    """
    signature = inspect.signature(model.forward)

    def takes(count: int) -> bool:
        try:
            signature.bind(*args[:count])
        except TypeError:
            return False
        return True

    taken = [count for count in range(1, len(args) + 1) if takes(count)] or [len(args)]
    return args[: taken[0]], taken[-1] - taken[0]


def _apart(value: Any) -> Any:
    """A tensor without the graph that it comes from."""
    return value.detach() if isinstance(value, torch.Tensor) else value


def _call_of_mmengine(model: Any, item: Any) -> Any:
    data = model.data_preprocessor(item, False)
    return model(**data, mode="tensor") if isinstance(data, dict) else model(*data, mode="tensor")


def _count(args: Any, kwargs: Any) -> int:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    stacked = next((len(tensor) for tensor in tensors if tensor.dim() >= 4), 0)
    return stacked or sum(tensor.dim() == 3 for tensor in tensors)
