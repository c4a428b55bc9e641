"""One forward pass, watched: which convolution is called on how large a map, and what becomes of its output."""

import contextlib
import threading
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.autograd.function import BackwardCFunction
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from coconv_surgery.layers.arguments import Pair
from coconv_surgery.tracing.axes import Axis
from coconv_surgery.tracing.copying import CopyError, held_by
from coconv_surgery.tracing.dataflow import Dataflow, Node
from coconv_surgery.tracing.following import Positions
from coconv_surgery.tracing.inputs import Inputs
from coconv_surgery.tracing.objects import tensors_in, walk
from coconv_surgery.tracing.operations import Operations, makes_anew
from coconv_surgery.tracing.padding import OneSided, padded_by
from coconv_surgery.tracing.readers import Reader, reader_of
from coconv_surgery.tracing.surroundings import kept_by
from coconv_surgery.tracing.twin import NetworkError, Twin
from coconv_surgery.tracing.unrecorded import Unrecordeds
from coconv_surgery.tracing.unseen import saved_as_they_are, saves_by_hooks
from coconv_surgery.tracing.weight_reads import WeightReads


@dataclass(frozen=True)
class Call:
    """One call of a convolution.

    Attributes:
        input_size: Height and width of its input.
        output_size: Height and width of its output.
        reader: What reads the output.
        padded_by: How the input is padded with something other than zeros, if it is.
        one_sided: Whether, along an axis, it sees nothing that comes later, or nothing that came earlier.
    """

    input_size: Pair
    output_size: Pair
    reader: Reader
    padded_by: str | None = None
    one_sided: bool = False


@dataclass(frozen=True)
class Observation:
    """What a forward pass showed.

    Attributes:
        calls: The calls of each convolution by name, in order.
        weight_reads: Convolutions whose weight took part in what came of the pass, outside their own forward.
        fake: Whether tensors had shapes but no data.
    """

    calls: dict[str, list[Call]]
    weight_reads: set[str]
    fake: bool


@dataclass(frozen=True)
class _Output:
    name: str
    input_size: Pair
    output_size: Pair
    node: Node | None
    axes: tuple[tuple[Axis, Axis], ...]


def observe(
    twin: Twin,
    watched: Mapping[nn.Module, str],
    inputs: Inputs,
    originals: Mapping[int, str] | None = None,
    frozen: Mapping[int, torch.Tensor] | None = None,
    *,
    see_through: bool = True,
) -> Observation:
    """Run a twin, and see what its convolutions do.

    Args:
        twin: A copy of a network.
        watched: Names of its convolutions.
        inputs: What to call it with.
        originals: Names of the parameters of the network itself, by ``id``, which nothing of the twin should reach.
        frozen: The numbers of those that are not trained, by the ``id`` of the twin's.
        see_through: Whether to follow the dataflow where the network switches gradients off. Where it is not followed,
            it is unknown.

    Raises:
        NetworkError: If the network's code raises something.
        CopyError: If its code runs a part of the network itself.
    """
    observer = _Observer(twin.model, watched, originals or {}, see_through)
    try:
        with observer:
            ends, entered = twin.run(inputs.args, dict(inputs.kwargs), inputs.call, observer.follow)
    except NetworkError as error:
        error.hidden = observer.switched
        if observer.fault is None:
            raise
    finally:
        observer.remove_hooks()
    if observer.fault is not None:  # which is not the network's, whoever has caught it meanwhile
        raise observer.fault
    return observer.conclude(ends, entered, twin, frozen)


def _weights(conv: nn.Module) -> list[torch.Tensor]:
    """The parameters that a convolution's weight is made of."""
    parametrization = getattr(conv, "parametrizations", {})
    held = [conv._parameters.get("weight")]
    if "weight" in parametrization:
        held += parametrization["weight"].parameters(recurse=False)
    return [weight for weight in held if weight is not None]


def _seen_in(value: Any) -> Iterable[Any]:
    """What an object holds, and what a function has kept for its next call."""
    if isinstance(value, types.FunctionType):
        return kept_by(value)
    return held_by(value)


_DETACH = (torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__)  # type: ignore[attr-defined]
_DETACH_IN_PLACE = (torch.Tensor.detach_, torch.detach_)


class _Observer(TorchFunctionMode):
    """Watches a forward pass: calls of convolutions, activations, and weights used outside their convolution.

    Attributes:
        fault: What went wrong in the observer itself.
        switched: Whether the network has tried to hide the dataflow.
    """

    def __init__(
        self, model: nn.Module, watched: Mapping[nn.Module, str], originals: Mapping[int, str], see_through: bool
    ) -> None:
        super().__init__()
        self._originals = originals
        self.fault: Exception | None = None
        self.switched = False
        self._see_through = see_through
        self._outputs: list[_Output] = []
        self._activations: list[torch.Tensor] = []
        self._thread = threading.get_ident()
        self._running = 0
        self._positions = Positions()
        self._weights = WeightReads(self._positions.depends_on_input)
        self._unrecorded = Unrecordeds()
        # What was computed since, with its node, and what a checkpoint then took for its own.
        self._computed: dict[int, tuple[torch.Tensor, Node]] = {}
        self._inside: dict[tuple[Node, int], Node] = {}
        # What was computed in inference mode, where a function such as a checkpoint takes its outputs out of the graph.
        self._attached: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._hooks: list[RemovableHandle] = []
        for module in model.modules():
            if module in watched:
                self._watch_conv(watched[module], module)
                self._weights.watch(watched[module], _weights(module))
            elif module._parameters and not isinstance(module, ParametrizationList):
                self._hooks.append(module.register_forward_hook(lambda module, args, output: self._activate(output)))

    def remove_hooks(self) -> None:
        """Take the hooks off the network."""
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def follow(self, inputs: Any) -> Iterator[None]:
        """Follow the positions of tensors inside, from inputs of the network."""

        def tell(operation: Any, args: Any, kwargs: Any, result: Any) -> None:
            with self._at_fault():
                if not self._running and not makes_anew(operation):
                    self._weights.tell((args, kwargs), result)
                self._positions.tell(operation, args, kwargs, result)

        with self._at_fault():
            self._positions.enter(inputs)
        with Operations(tell):
            yield

    def conclude(self, ends: Any, entered: Any, twin: Twin, frozen: Mapping[int, torch.Tensor] | None) -> Observation:
        """Say what was seen, given what the network was called with and what came of it."""
        given, returned = list(tensors_in(entered)), list(self._results_in(ends))
        activations = self._nodes([*self._activations, *given])
        outputs = {output.node for output in self._outputs if output.node is not None}
        # A map has more numbers than there are images.
        images = max((tensor.size(0) for tensor in given if tensor.dim() > 2), default=1)
        elsewhere = [*given, *self._results_in(twin.model), *self._unrecorded.left]
        maps, left = (
            set(self._nodes(tensor for tensor in tensors if tensor.dim() > 1 or tensor.numel() > images))
            for tensors in (returned, elsewhere)
        )
        others, positions = {*outputs, *maps, *left}, self._unrecorded.positions
        dataflow = Dataflow(self._nodes(returned), activations, others, self._inside, positions, frozen)
        self._positions.leave(ends)
        calls, one_sided = defaultdict(list), OneSided()
        for output in self._outputs:
            modes = (mode for input, behind in output.axes if (mode := padded_by(input, behind)))
            call = Call(
                output.input_size,
                output.output_size,
                reader_of(dataflow, output.node, maps, left),
                next(modes, None),
                any(one_sided(*axes) for axes in output.axes),
            )
            calls[output.name].append(call)
        self._weights.leave(returned)
        return Observation(calls, self._weights.names, twin.fake)

    def _results_in(self, value: Any) -> Iterator[torch.Tensor]:
        """The tensors in an object, with the nodes that computed them."""
        found = (part for part in walk(value, into=_seen_in) if isinstance(part, torch.Tensor))
        return map(self._attach, found)

    def _nodes(self, tensors: Iterable[torch.Tensor]) -> list[Node]:
        """The nodes that computed tensors, as far as something did."""
        return [node for tensor in tensors if (node := self._node_of(tensor)) is not None]

    def _watch_conv(self, name: str, conv: nn.Module) -> None:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._running += 1

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._running -= 1
            with self._at_fault():
                self._note(name, next(iter((*args, *kwargs.values())), None), output)
            self._activate(output)

        self._hooks.append(conv.register_forward_pre_hook(enter))
        # A model may catch what its convolution raises.
        self._hooks.append(conv.register_forward_hook(leave, with_kwargs=True, always_call=True))

    def _note(self, name: str, input: Any, output: Any) -> None:
        # Other kinds may take and return something else than maps.
        if all(isinstance(value, torch.Tensor) and value.dim() >= 3 for value in (input, output)):
            size, output_size = (input.shape[-2], input.shape[-1]), (output.shape[-2], output.shape[-1])
            axes = tuple(zip(self._positions.of_map(input), self._positions.of_map(output), strict=True))
            seen = threading.get_ident() == self._thread  # nobody sees what other threads compute
            self._outputs.append(_Output(name, size, output_size, output.grad_fn if seen else None, axes))

    def _activate(self, output: Any) -> None:
        with self._at_fault():
            tensors = [output] if isinstance(output, torch.Tensor) else tensors_in(output)
            # Kept alive, because a function written in Python is part of the graph as long as its output is.
            self._activations += [tensor for tensor in tensors if tensor.grad_fn is not None]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument in args:
            if id(argument) in self._originals:
                with self._at_fault():
                    raise CopyError(
                        "planning runs a copy of the network, whose code runs a part of the network itself, with "
                        f"model.{self._originals[id(argument)]}: let it reach that part as an attribute"
                    )
        result = self._compute(func, args, kwargs or {})
        if torch.is_grad_enabled():
            with self._at_fault():
                self._unrecorded.see(func, args, kwargs or {}, result)
        return result

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        if saves_by_hooks():  # the network's own, which may keep what it is given
            with saved_as_they_are():
                return self._record(func, args, kwargs)
        return self._record(func, args, kwargs)

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute what the network asks for, with the dataflow recorded even where it switches gradients off."""
        if not self._see_through:
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            self.switched |= not args[0]
            return func(True)
        if func in _DETACH and args[0].grad_fn is not None:
            self.switched = True
            return torch.ops.aten.alias.default(args[0])
        if func in _DETACH and not args[0].requires_grad:
            return args[0]  # so that what is written there is known to be in both
        if func in _DETACH_IN_PLACE and args[0].grad_fn is not None:
            self.switched = True
            return args[0]
        if self.switched:
            args, kwargs = tree_map_only(torch.Tensor, self._attach, (args, kwargs))
            for tensor in tensors_in(args):
                self._node_of(tensor)
        inference = torch.is_inference_mode_enabled()
        self.switched |= inference
        try:
            with torch.inference_mode(False) if inference else contextlib.nullcontext():
                result = func(*args, **kwargs)
                if inference and isinstance(result, torch.Tensor) and result.grad_fn is not None:
                    self._attached[id(result)] = (result, torch.ops.aten.alias.default(result))
        except RuntimeError:
            if not self.switched:
                raise
            return self._as_asked(func, args, kwargs)
        if self.switched and isinstance(result, torch.Tensor) and result.grad_fn is not None:
            self._computed[id(result)] = (result, result.grad_fn)
        return result

    def _node_of(self, tensor: torch.Tensor) -> Node:
        """The node that computed a tensor: inside of a function such as a checkpoint, if it comes from one."""
        if tensor.grad_fn is None:
            return self._unrecorded.node_of(tensor)
        node, (_, computed_by) = tensor.grad_fn, self._computed.get(id(tensor), (tensor, None))
        if computed_by is not None and isinstance(node, BackwardCFunction):
            self._inside.setdefault((node, tensor.output_nr), computed_by)
        return self._inside.get((node, tensor.output_nr), node)

    def _attach(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with the node that computed it, which a function may have taken from it since."""
        computed, attached = self._attached.get(id(tensor), (None, tensor))
        return attached if computed is tensor and tensor.grad_fn is None else tensor

    def _as_asked(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute what cannot be recorded: parameters written in place, conversions to numpy and the like."""
        with torch.no_grad():
            try:
                return func(*args, **kwargs)
            except RuntimeError:
                return func(*tree_map_only(torch.Tensor, torch.Tensor.detach, args), **kwargs)

    @contextlib.contextmanager
    def _at_fault(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.fault = error
            raise
