"""Which norm reads the output of which layer, and what else does: seen in one forward pass, operation by operation."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from coconv_surgery.deployment.kernels import is_layer
from coconv_surgery.deployment.norms import is_norm
from coconv_surgery.tracing.inputs import Inputs
from coconv_surgery.tracing.objects import tensors_in
from coconv_surgery.tracing.operations import Leaving, Operations

_WeakDict: Any = WeakIdKeyDictionary  # torch has no types for it


@dataclass
class Seen:
    """A layer or a norm that was called.

    Attributes:
        module: It.
        rank: How many dimensions the map has that it was called with; None if that was more than a map, or if hooks of
            the network's own see it.
        others: Of a layer, the norms that read its output; of a norm, the layers whose output it reads.
        otherwise: Whether a layer's output is read by something else, or a norm reads something else.
    """

    module: nn.Module
    rank: int | None = None
    others: set[str] = field(default_factory=set)
    otherwise: bool = False


class Watch:
    """Watches a network run.

    Args:
        model: A copy of a network, in evaluation mode.

    Attributes:
        layers (dict[str, Seen]): The layers that were called, by name.
        norms (dict[str, Seen]): The norms that were called.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[str, Seen] = {}
        self.norms: dict[str, Seen] = {}
        self._model = model
        self._outputs: Any = _WeakDict()  # by name of the layer
        self._in_norms: list[Any] = []  # what the norms that are running were called with

    def run(self, inputs: Inputs) -> Any:
        """Run the network.

        Returns:
            What it returns.
        """
        with self._hooks(), torch.no_grad(), Operations(self._read_by), Leaving(self.read):
            outputs = inputs.run(self._model)
        self.read(tensors_in(outputs))
        self.read(list(self._outputs.keys()))  # whoever keeps them may read them
        return outputs

    def read(self, values: Iterable[Any]) -> None:
        """Note that something that is not a norm reads tensors."""
        for value in values:
            by_norm = any(value is image for image in self._in_norms)
            if isinstance(value, torch.Tensor) and value in self._outputs and not by_norm:
                self.layers[self._outputs[value]].otherwise = True

    def _read_by(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        self.read(tree_leaves((args, kwargs)))

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, module in self._model.named_modules():
                if is_norm(module):
                    handles = [
                        module.register_forward_pre_hook(self._enter_norm(name), with_kwargs=True),
                        module.register_forward_hook(self._leave_norm, always_call=True),
                    ]
                elif is_layer(module):
                    handles = [module.register_forward_hook(self._leave_layer(name), with_kwargs=True)]
                else:
                    continue
                for handle in handles:
                    stack.callback(handle.remove)
            yield

    def _leave_layer(self, name: str) -> Any:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen = _see(self.layers, name, module, args, kwargs)
            if isinstance(output, torch.Tensor):
                seen.otherwise |= output in self._outputs
                self._outputs[output] = name

        return leave

    def _enter_norm(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen = _see(self.norms, name, module, args, kwargs)
            image = _image_of(args, kwargs)
            layer = None if image is None else self._outputs.get(image)
            if layer is None:
                seen.otherwise = True
            else:
                seen.others.add(layer)
                self.layers[layer].others.add(name)
            self._in_norms.append(image)

        return enter

    def _leave_norm(self, *_: Any) -> None:
        self._in_norms.pop()


def _image_of(args: Any, kwargs: Any) -> torch.Tensor | None:
    """The map that a module is called with, if that is all."""
    given = [*args, *kwargs.values()]
    alone = len(given) == 1 and isinstance(given[0], torch.Tensor) and kwargs.keys() <= {"input"}
    return given[0] if alone else None


def _is_hooked(module: nn.Module) -> bool:
    """Whether hooks of the network's own see what goes in or comes out, and do not only compute its weight."""
    before = [hook for hook in module._forward_pre_hooks.values() if getattr(hook, "__module__", "") != __name__]
    return len(module._forward_hooks) > 1 or (bool(before) and "weight" in module._parameters)  # one is the watch's


def _see(table: dict[str, Seen], name: str, module: nn.Module, args: Any, kwargs: Any) -> Seen:
    image = _image_of(args, kwargs)
    rank = image.dim() if image is not None and not _is_hooked(module) else None
    seen = table.setdefault(name, Seen(module, rank))
    seen.rank = rank if rank == seen.rank else None
    return seen
