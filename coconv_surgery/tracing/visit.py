"""Copies of a network that leave nothing behind, wherever the network's code puts things."""

import contextlib
import contextvars
import functools
import gc
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import torch
import torch.fx as fx
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor

from coconv_surgery.tracing.inputs import Inputs
from coconv_surgery.tracing.objects import dict_of
from coconv_surgery.tracing.surroundings import Surroundings
from coconv_surgery.tracing.twin import Twin

_Result = TypeVar("_Result")


class Visit:
    """Makes twins of a network. When it ends nothing of them is left, and all around them is as it was.

    Args:
        model: The network.
        inputs: What it is to be called with.

    Attributes:
        model (nn.Module): The network.
        failed (bool): Whether the network does not run: its error keeps what it came through.

    Raises:
        ValueError: At the end, if somebody keeps a part of a twin, or a tensor of it, and cannot be made to let go.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model = model
        self.failed = False
        self._surroundings = Surroundings(model, *([inputs.call] if inputs.call else []))
        # Operations on single numbers are computed even where tensors have no data.
        self._surroundings.keep_buffers(of_at_most=1)
        self._twins: list[Twin] = []

    def twin(self, *, fake: bool = True) -> Twin:
        """A new twin of the network, with tensors that have no data or with real ones."""
        if not fake:
            self._surroundings.keep_buffers()
        self._twins.append(Twin(self.model, self._surroundings, fake=fake))
        return self._twins[-1]

    def __enter__(self) -> "Visit":
        self._surroundings.empty_caches()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        torch.clear_autocast_cache()  # which has casts of the twins' weights
        self._surroundings.put_back()
        traces = [trace for twin in self._twins for trace in twin.traces()]
        while self._twins:
            self._twins.pop().take_apart()
        if error is None:
            self._let_go(traces)

    def _let_go(self, traces: list[weakref.ref[Any]]) -> None:
        # Most is gone at once; the rest is garbage, and mostly young; what is not, somebody keeps.
        young, take_out = functools.partial(gc.collect, 1), functools.partial(_take_out, traces)
        for step in (young, gc.collect, take_out, gc.collect):
            if not _alive(traces):
                return
            step()
        if _alive(traces) and not self.failed:
            holder = _holder(traces)
            _delete_attributes(traces)
            raise ValueError(
                f"{type(self.model).__name__} keeps what planning computed in {holder}, where it cannot be told what "
                "there was before: the network may return it, or miss an attribute that is deleted now. Make anew what "
                "it keeps there, and let planning run with numbers, example_inputs=Inputs(..., needs_numbers=True), or "
                "plan another instance and apply_plan() that"
            )


def on_a_copy(model: nn.Module, inputs: Inputs, work: Callable[[nn.Module], _Result]) -> _Result:
    """Do some work on a copy of a network that computes numbers, and leave nothing of it but what the work gives.

    Args:
        model: The network.
        inputs: What the copy is to be called with.
        work: A function of the copy.
    """
    with Visit(model, inputs) as visit:
        return contextvars.copy_context().run(work, visit.twin(fake=False).model)


def _alive(traces: Iterable[weakref.ref[Any]]) -> list[Any]:
    return [part for trace in traces if (part := trace()) is not None]


def _take_out(traces: Iterable[weakref.ref[Any]]) -> None:
    """Take what is left of twins out of the containers and caches that hold it, wherever they are.

    What stood there before, if anything did, is not known. Attributes and global names are therefore left: without one
    that it had, the network would not run.
    """
    ours = {id(part) for part in _made_with(traces)}
    steps: list[Callable[[], object]] = []  # taken when the list of all objects, which keeps them alive, is gone
    tables: dict[int, tuple[dict[Any, Any], list[Any]]] = {}
    for value in gc.get_objects():
        if id(value) in ours:
            continue
        if type(value) is functools._lru_cache_wrapper:
            steps += _out_of_cache(value, ours)
        elif type(value) in (dict, OrderedDict):
            held = [key for key, item in list(value.items()) if _holds((key, item), ours)]
            if held:
                tables[id(value)] = value, held
        elif type(value) in (list, deque) and _holds(value, ours):
            steps.append(functools.partial(_keep_only, value, [item for item in value if not _holds((item,), ours)]))
        elif type(value) is set and _holds(value, ours):
            steps.append(functools.partial(value.difference_update, [item for item in value if _holds((item,), ours)]))
    for number in tables.keys() - _owners(tables).keys():
        table, held = tables[number]
        steps += [functools.partial(table.pop, key, None) for key in held]
    tables.clear()
    while steps:
        steps.pop()()


def _owners(tables: Collection[int]) -> dict[int, Any]:
    """The objects and classes whose attributes some dictionaries hold, which are given by their ``id``."""
    return {
        id(part): value
        for value in gc.get_objects()
        for part in gc.get_referents(value)
        # What else a class holds it holds in its namespace.
        if id(part) in tables and (isinstance(value, type) or dict_of(value) is part)
    }


def _delete_attributes(traces: Iterable[weakref.ref[Any]]) -> None:
    """Delete what objects and classes hold of twins: an attribute that is missed is better than one of no numbers."""
    ours = {id(part) for part in _made_with(traces)}
    holders = [value for value in gc.get_objects() if any(id(part) in ours for part in gc.get_referents(value))]
    owners = _owners({id(value) for value in holders if type(value) is dict}).values()
    for owner in (*holders, *owners):
        namespace = vars(owner) if isinstance(owner, type) else dict_of(owner) or {}
        delete: Any = type.__delattr__ if isinstance(owner, type) else object.__delattr__
        for name in [name for name, item in list(namespace.items()) if id(item) in ours]:
            with contextlib.suppress(AttributeError, TypeError):
                delete(owner, name)


def _out_of_cache(cache: Any, ours: set[int]) -> list[Callable[[], object]]:
    held = gc.get_referents(cache)
    entries = [part for part in held if type(part) is dict and part is not vars(cache)]
    if cache.cache_parameters()["maxsize"] is not None:  # a ring of links besides, out of which none can be taken
        items = (item for part in entries for entry in part.items() for item in entry)
        return [cache.cache_clear] if _holds([*held, *items], ours) else []
    taken = [(part, key) for part in entries for key, item in part.items() if _holds((key, item), ours)]
    return [functools.partial(part.pop, key, None) for part, key in taken]


def _keep_only(container: Any, items: list[Any]) -> None:
    container.clear()
    container.extend(items)


def _made_with(traces: Iterable[weakref.ref[Any]]) -> list[Any]:
    """What is left of twins: modules, tensors without data, proxies; and their attributes."""
    left = _alive(traces)
    known = {id(part) for part in left}
    owner = {FakeTensor: "fake_mode", fx.Tracer: "root", fx.Proxy: "tracer"}
    kinds = tuple(owner)
    for value in gc.get_objects():
        if issubclass(type(value), kinds):
            holder = next(getattr(value, name) for kind, name in owner.items() if isinstance(value, kind))
            if id(holder.root if isinstance(holder, fx.Tracer) else holder) in known:
                left.append(value)
    return [*left, *(vars(value) for value in left if hasattr(value, "__dict__"))]


def _holds(values: Iterable[Any], ours: set[int]) -> bool:
    """Whether some values are of a twin, or tuples of such, or links of a cache to such."""
    for value in values:
        if id(value) in ours:
            return True
        link = type(value).__name__ == "_lru_list_elem"
        if (link or issubclass(type(value), tuple | frozenset)) and _holds(gc.get_referents(value), ours):
            return True
    return False


def _holder(traces: Iterable[weakref.ref[Any]]) -> str:
    """Who keeps what is left of twins, for a reader."""
    ours = _made_with(traces)
    ids = {id(part) for part in ours}
    for value in gc.get_objects():
        if id(value) in ids or value is ours or type(value) is types.FrameType:
            continue
        if any(id(part) in ids for part in gc.get_referents(value)):
            owners = [type(owner).__qualname__ for owner in gc.get_referrers(value) if not isinstance(owner, list)]
            return f"a {type(value).__qualname__}" + (f" of a {owners[0]}" if owners else "")
    return "a place that Python does not tell"
