"""What is left of twins that should be gone, who holds it, and how to make them let go."""

import contextlib
import functools
import gc
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor

from coconv_surgery.tracing.objects import dict_of

_PIECE = 64  # objects that are asked at once, of which mostly none is it
# What a tensor without data and a proxy know their twin by.
_OWNERS = {FakeTensor: "fake_mode", fx.Tracer: "root", fx.Proxy: "tracer"}


def alive(traces: Iterable[weakref.ref[Any]]) -> list[Any]:
    """What has not gone of that which should have."""
    return [part for trace in traces if (part := trace()) is not None]


def take_out(traces: Iterable[weakref.ref[Any]]) -> None:
    """Take what is left of twins out of the containers and caches that hold it, wherever they are.

    What stood there before, if anything did, is not known. Attributes and global names are therefore left: without one
    that it had, the network would not run.

    Args:
        traces: Of the twins.
    """
    for step in _steps(_Search(traces)):  # the search is gone by now: it keeps what it found
        step()


def delete_attributes(traces: Iterable[weakref.ref[Any]]) -> str:
    """Delete what objects and classes hold of twins: an attribute that is missed is better than one of no numbers.

    Args:
        traces: Of the twins.

    Returns:
        Who kept what is left of them, for a reader.
    """
    search = _Search(traces)
    holder = _first_of(search.holders)
    owners = _owners([value for value in search.holders if type(value) is dict]).values()
    for owner in (*search.holders, *owners):
        namespace = vars(owner) if isinstance(owner, type) else dict_of(owner) or {}
        delete: Any = type.__delattr__ if isinstance(owner, type) else object.__delattr__
        for name in [name for name, item in list(namespace.items()) if search.holds(item)]:
            with contextlib.suppress(AttributeError, TypeError):
                delete(owner, name)
    return holder


def _first_of(holders: Iterable[Any]) -> str:
    """The first of some holders that is not a function at work, in words."""
    for value in holders:
        if type(value) is not types.FrameType:
            owners = [type(owner).__qualname__ for owner in gc.get_referrers(value) if not isinstance(owner, list)]
            return f"a {type(value).__qualname__}" + (f" of a {owners[0]}" if owners else "")
    return "a place that Python does not tell" + (", or not after gc.freeze()" if gc.get_freeze_count() else "")


class _Search:
    """A look at every object there is.

    Attributes:
        ours (dict[int, Any]): Each thing that is left by its ``id``: modules, tensors without data, proxies; their
            attributes; and tuples, frozensets and links of caches that hold such.
        holders (list[Any]): What else refers to one of them.
    """

    def __init__(self, traces: Iterable[weakref.ref[Any]]) -> None:
        every = gc.get_objects()
        left = alive(traces)
        known = {id(part) for part in left}
        kinds = {kind for kind in set(map(type, every)) if issubclass(kind, tuple(_OWNERS))}
        left += [value for value in every if type(value) in kinds and id(_twin_of(value)) in known]
        found = [*left, *(vars(value) for value in left if hasattr(value, "__dict__"))]
        self.ours: dict[int, Any] = {}
        holders: dict[int, Any] = {}
        while found:
            new = {id(value): value for value in found}
            self.ours |= new
            held_by = _referring(new, every)
            found = [value for value in held_by if _carries(value) and id(value) not in self.ours]
            holders |= {id(value): value for value in held_by}
        self.holders = [value for number, value in holders.items() if number not in self.ours]

    def holds(self, *values: Any) -> bool:
        """Whether some values are of what is left."""
        return any(id(value) in self.ours for value in values)


def _referring(numbers: Collection[int], values: list[Any]) -> list[Any]:
    """Those of some values that refer to something with one of these ids."""
    wanted = frozenset(numbers)
    pieces = (values[start : start + _PIECE] for start in range(0, len(values), _PIECE))
    return [
        value
        for piece in pieces
        if not wanted.isdisjoint(map(id, gc.get_referents(*piece)))
        for value in piece
        if not wanted.isdisjoint(map(id, gc.get_referents(value)))
    ]


def _twin_of(value: Any) -> Any:
    owner = next(getattr(value, name, None) for kind, name in _OWNERS.items() if isinstance(value, kind))
    return getattr(owner, "root", None) if isinstance(owner, fx.Tracer) else owner


def _carries(value: Any) -> bool:
    """Whether a value is one of those that cannot be changed, so that who holds it holds what is in it."""
    return issubclass(type(value), tuple | frozenset) or type(value).__name__ == "_lru_list_elem"


def _steps(search: _Search) -> list[Callable[[], object]]:
    """What there is to do to take all out that containers and caches hold."""
    steps: list[Callable[[], object]] = []
    tables = {id(value): value for value in search.holders if type(value) in (dict, OrderedDict)}
    for number in tables.keys() - _owners(tables.values()).keys():
        held = [key for key, item in list(tables[number].items()) if search.holds(key, item)]
        steps += [functools.partial(tables[number].pop, key, None) for key in held]
    for value in search.holders:
        if type(value) in (list, deque):
            steps.append(functools.partial(_keep_only, value, [item for item in value if not search.holds(item)]))
        elif type(value) is set:
            steps.append(functools.partial(value.difference_update, [item for item in value if search.holds(item)]))
        elif type(value) is functools._lru_cache_wrapper:  # a ring of links, out of which none can be taken
            steps.append(value.cache_clear)
    return steps


def _owners(tables: Collection[Any]) -> dict[int, Any]:
    """The objects and classes whose attributes some dictionaries hold, by the ``id`` of these."""
    numbers = {id(table) for table in tables}
    return {
        id(part): value
        for value in gc.get_referrers(*tables)
        for part in gc.get_referents(value)
        # What else a class holds it holds in its namespace.
        if id(part) in numbers and (isinstance(value, type) or dict_of(value) is part)
    }


def _keep_only(container: Any, items: list[Any]) -> None:
    container.clear()
    container.extend(items)
