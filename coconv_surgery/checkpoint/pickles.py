"""The pickle in a torch file, followed without building anything: what torch's safe loader would be told to do.

That loader calls nothing but what rebuilds tensors, yet it believes every size: ``bytearray(10**10)`` is fine with it,
and so is a tensor of 64 bytes that claims to be of 2 GB.
"""

import math
import pickletools
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import torch

ALLOWED = [Namespace]
"""What is allowed beside tensors: timm writes its arguments into a checkpoint."""

_LARGEST_KEY = 2**63
_MOST_DIMENSIONS = 64
# A tensor of one number takes 29 instructions, 7 of which make something that Python's garbage collector looks at again
# and again, and 120 bytes in a file.
_INSTRUCTIONS_PER_BYTE = 0.5
_FREE_INSTRUCTIONS = 10_000
_COST_OF_A_CONTAINER = 5
_CHARACTERS_PER_INSTRUCTION = 8


class RefusedError(ValueError):
    """What a file must not hold, in words that follow its name."""


class _Name(str):
    """A class or function, which is not looked up."""


class _Mark:
    """Where the entries of a tuple, a list or a dict begin."""


class _Dict:
    """A dict, whose entries do not matter."""


class _Built:
    """Something that the loader builds, and does nothing more with."""


# One of each will do, and costs nothing.
_MARK, _DICT, _BUILT = _Mark(), _Dict(), _Built()


@dataclass(frozen=True)
class _Storage:
    nbytes: int
    itemsize: int


@dataclass
class Pickle:
    """Follows pickles.

    Args:
        size: Size of the file in bytes, which nothing may exceed.
        records: Sizes of its storages by key. Default: not known, but together no larger than the file.
    """

    size: int
    records: Mapping[str, int] | None = None
    _stack: list[Any] = field(default_factory=list)
    _memo: dict[int, Any] = field(default_factory=dict)
    _storages: dict[str, _Storage] = field(default_factory=dict)
    _allowed: set[str] = field(default_factory=lambda: _allowed_names())
    _instructions_left: int = 0
    _bytes_left: int = 0
    _entries: int = 0

    def __post_init__(self) -> None:
        self._instructions_left = int(self.size * _INSTRUCTIONS_PER_BYTE) + _FREE_INSTRUCTIONS
        self._bytes_left = self.size

    def follow(self, file: BinaryIO) -> None:
        """Follow one pickle to its end.

        Raises:
            RefusedError: If it does what no file of weights needs to.
            ValueError: If it is damaged.
        """
        self._stack, self._memo = [], {}
        for code, argument, _ in pickletools.genops(file):
            self._spend(_COST_OF_A_CONTAINER if code.name in _CONTAINERS else 1)
            try:
                self._step(code.name, argument)
            except (AttributeError, IndexError, KeyError, TypeError) as error:
                raise ValueError(f"{code.name} does not find what it needs") from error

    def _spend(self, instructions: int) -> None:
        self._instructions_left -= instructions
        if self._instructions_left < 0:
            raise RefusedError("is made of instructions rather than weights")

    def _step(self, code: str, argument: Any) -> None:
        stack = self._stack
        if code in _PUSHED:
            stack.append(_PUSHED[code]())
        elif code in _GIVEN:
            stack.append(argument)
        elif code in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif code in _TUPLES:
            count = _TUPLES[code]
            stack[-count:] = [tuple(stack[-count:])]
        elif code == "TUPLE":
            stack.append(tuple(self._marked()))
        elif code in ("APPEND", "APPENDS"):
            items = self._marked() if code == "APPENDS" else [stack.pop()]
            _of_kind(stack[-1], list).extend(items)
        elif code in ("SETITEM", "SETITEMS"):
            items = self._marked() if code == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _check_keys(items[::2])
            _of_kind(stack[-1], _Dict)
            self._entries += len(items) // 2
        elif code == "GLOBAL":
            stack.append(self._name(argument))
        elif code == "BINPERSID":
            stack.append(self._storage(*_of_kind(stack.pop(), tuple)))
        elif code in ("REDUCE", "NEWOBJ"):
            arguments = _of_kind(stack.pop(), tuple)
            stack.append(self._call(_of_kind(stack.pop(), _Name), arguments))
        elif code == "BUILD":
            stack.pop()
            _of_kind(stack[-1], _Dict | _Built)
        elif code not in ("PROTO", "STOP"):
            raise RefusedError(f"has the instruction {code} in its pickle, which torch does not write")

    def _marked(self) -> list[Any]:
        stack = self._stack
        start = len(stack) - 1
        while stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise IndexError
        items = stack[start + 1 :]
        del stack[start:]
        return items

    def _name(self, argument: str) -> _Name:
        module, _, name = argument.partition(" ")
        full = f"{_RENAMED.get(module, module)}.{name}"
        of_torch = module in _STORAGES and (name.endswith("Storage") or isinstance(getattr(torch, name, None), _KINDS))
        if not (of_torch or full in _TENSORS or full in _CALLS or full in _CLASSES or full in self._allowed):
            raise RefusedError(f"holds more than tensors ({module}.{name}), and the safe loader does not execute that")
        return _Name(full)

    def _storage(self, kind: str, storage: _Name, key: str, _: Any, count: int, view: Any = None) -> _Storage:
        if kind != "storage":
            raise RefusedError("refers to something that is no storage")
        itemsize = 1 if storage.endswith(".UntypedStorage") else _dtype_of_storage(storage).itemsize
        self._check_storage(str(key), _count(count) * itemsize)
        first = self._storages.setdefault(str(key), _Storage(count * itemsize, itemsize))
        if view is None:
            return first  # as torch does, whatever the same storage is called later
        _, offset, size = view
        if _count(offset) + _count(size) > count:
            raise RefusedError(f"has a view beyond the end of storage {key}")
        return _Storage(size * itemsize, itemsize)

    def _check_storage(self, key: str, nbytes: int) -> None:
        if nbytes > (self.size if self.records is None else self.records.get(key, 0)):
            raise RefusedError(f"is not a complete checkpoint: {nbytes:,} bytes of storage {key} are not there")
        if key not in self._storages:
            self._bytes_left -= nbytes
            if self._bytes_left < 0:
                raise RefusedError("is not a complete checkpoint: its storages claim more bytes than there are")

    def _call(self, name: _Name, arguments: tuple[Any, ...]) -> Any:
        self._pay_for_copies(name, arguments)
        if name in _TENSORS:
            storage, offset, shape, strides = arguments[:4]
            itemsize = _dtype(arguments[6]).itemsize if name.endswith("_v3") else storage.itemsize
            self._check_tensor(storage.nbytes // itemsize, _count(offset), shape, strides)
            return _BUILT
        if name in _CALLS:
            return _CALLS[name](arguments)
        if name == _SUBCLASS:
            function, _, inner, *_ = arguments
            return self._call(_of_kind(function, _Name), _of_kind(inner, tuple))
        if name in self._allowed:
            self._check_shape(name, arguments)
            return _BUILT
        raise RefusedError(f"calls {name}, which no tensor is made by")

    def _pay_for_copies(self, name: _Name, arguments: tuple[Any, ...]) -> None:
        # What is large could be given again and again.
        for argument in arguments:
            if isinstance(argument, str | bytes):
                self._spend(len(argument) // _CHARACTERS_PER_INSTRUCTION)
            elif isinstance(argument, tuple | list):
                self._spend(len(argument))
            elif isinstance(argument, _Dict) and name == "collections.Counter":
                self._spend(self._entries)

    def _check_tensor(self, held: int, offset: int, shape: tuple[Any, ...], strides: tuple[Any, ...]) -> None:
        if len(shape) != len(strides) or len(shape) > _MOST_DIMENSIONS:
            raise RefusedError(f"holds a damaged tensor{self._where()}")
        count = math.prod(map(_count, shape))
        last = offset + sum((side - 1) * _count(stride) for side, stride in zip(shape, strides, strict=True))
        if count and (last >= held or count > held):
            raise RefusedError(
                f"holds a tensor{self._where()} that claims {count:,} numbers of the {held:,} in its storage"
            )

    def _check_shape(self, name: str, arguments: tuple[Any, ...]) -> None:
        # It could be an array that is told its shape.
        entries: list[Any] = [arguments]
        count, seen = 1, set()
        for entry in entries:
            if isinstance(entry, tuple | list) and id(entry) not in seen:
                seen.add(id(entry))
                entries += entry
            elif isinstance(entry, int) and entry > 1:
                count *= entry
            if count > self.size:
                raise RefusedError(f"makes a {name} that is larger than the file")

    def _where(self) -> str:
        name = next((entry for entry in reversed(self._stack) if type(entry) is str), None)
        return "" if name is None else f" {name[:100]!r}"


def _allowed_names() -> set[str]:
    """What may be called beside what rebuilds tensors: timm's own, and what a user has told torch."""
    told: list[Any] = getattr(torch.serialization, "get_safe_globals", list)()
    pairs = [entry if isinstance(entry, tuple) else (entry, None) for entry in (*ALLOWED, *told)]
    return {name or f"{value.__module__}.{value.__qualname__}" for value, name in pairs}


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, _of_kind(name, _Name).removeprefix("torch."), None)
    return cast(torch.dtype, _of_kind(found, torch.dtype))


def _dtype_of_storage(name: _Name) -> torch.dtype:
    kind = getattr(torch, name.rpartition(".")[2], None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there are types of storages
        return cast(torch.dtype, _of_kind(getattr(kind, "dtype", None), torch.dtype))


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise RefusedError("has a size that is no number")
    return value


def _of_kind(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} where another kind is needed")
    return value


def _check_keys(keys: list[Any]) -> None:
    for key in keys:
        if type(key) not in (str, int, float, bool, bytes, type(None)):
            raise RefusedError(f"has a {type(key).__name__} for a key")
        if isinstance(key, int) and abs(key) > _LARGEST_KEY:
            raise RefusedError("has a key of more than 64 bits")


def _ordered_dict(arguments: tuple[Any, ...]) -> _Dict:
    for pairs in arguments:
        _check_keys([key for key, _ in _of_kind(pairs, list)])
    return _DICT


def _set(arguments: tuple[Any, ...]) -> _Built:
    for entries in arguments:
        _check_keys(_of_kind(entries, list))
    return _BUILT


def _encoded(arguments: tuple[Any, ...]) -> bytes:
    content, coding = arguments
    if coding not in ("latin1", "latin-1"):
        raise RefusedError("has bytes in a coding other than latin1")
    return bytes(_of_kind(content, str), "latin-1")


def _built(arguments: tuple[Any, ...]) -> _Built:
    return _BUILT


_PUSHED: dict[str, Callable[[], Any]] = {
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": lambda: _DICT,
}
_GIVEN = {"BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "BINUNICODE", "SHORT_BINSTRING"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CONTAINERS = {"MARK", "EMPTY_LIST", "EMPTY_DICT", "TUPLE", *_TUPLES}
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_STORAGES = ("torch", "torch.cuda", "torch.storage")
_KINDS = (torch.dtype, torch.qscheme, torch.layout)
_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
_TENSORS = {
    f"torch._utils.{name}"
    for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")
}
_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_parameter": _built,
    "torch._utils._rebuild_parameter_with_state": _built,
    "torch._utils._rebuild_meta_tensor_no_storage": _built,
    "torch._utils._rebuild_sparse_tensor": _built,
    "torch.serialization._get_layout": _built,
    "torch.Size": lambda arguments: tuple(*arguments),
    "torch.device": _built,
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _built,
    "_codecs.encode": _encoded,
    "builtins.set": _set,
    "builtins.complex": _built,
}
_CLASSES = {"torch.Tensor", "torch.nn.parameter.Parameter", _SUBCLASS}
