"""What callers give, checked: one message, which names the argument, what is wrong with it, and what would do.

A value of a wrong kind altogether is a :class:`TypeError`, what is not the number or the word that it should be a
:class:`ValueError`, and a file that is not there an :class:`OSError`.
"""

import difflib
import operator
import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Pair = tuple[int, int]
_SHOWN = 100
_LARGEST = 2**63 - 1
_LONGEST = 2**16


def whole_number(value: Any, name: str, at_least: int | None = None) -> int:
    """A value as a Python integer; numpy's integers and the like are fine.

    Args:
        value: The value.
        name: What it is, for the message.
        at_least: The smallest that it may be.

    Raises:
        ValueError: If it is a boolean, not a whole number of an integer type, or too small or large.

    >>> whole_number(3, "levels")
    3
    """
    number = as_number(value)
    if number is None:
        raise ValueError(f"{name}={shown(value)} must be a whole number")
    if at_least is not None and number < at_least:
        raise ValueError(f"{name}={shown(value)} must be at least {at_least}")
    if number > _LARGEST:
        raise ValueError(f"{name}={shown(value)} is too large: torch counts in 64 bits")
    return number


def as_number(value: Any) -> int | None:
    """A whole number as a Python integer, and None for anything else."""
    try:
        return None if isinstance(value, bool | torch.Tensor) else operator.index(value)
    except TypeError:
        return None


def whole_numbers(
    values: Any,
    name: str,
    form: str,
    *,
    lengths: Collection[int] | None = None,
    alone: int = 0,
    at_least: int | None = 1,
) -> tuple[int, ...]:
    """Several whole numbers, as Python integers.

    Args:
        values: The values.
        name: What they are, for the message.
        form: What they should be, for the message.
        lengths: How many there may be. Default: one or more.
        alone: As how many a single number counts, where there may be one.
        at_least: The smallest that they may be.

    Raises:
        ValueError: If they are not.

    >>> whole_numbers(3, "kernel_size", "must be a side or (height, width)", lengths=[2], alone=2)
    (3, 3)
    """
    single = as_number(values) if alone else None
    try:
        each = sequence(values, name, form) if single is None else (single,) * alone
        numbers = tuple(whole_number(value, name, at_least) for value in each)
    except ValueError:
        numbers = ()
    if not numbers or (lengths is not None and len(numbers) not in lengths):
        raise ValueError(f"{name}={shown(values)} {form}")
    return numbers


def height_and_width(value: Any, name: str, at_least: int | None = None) -> Pair:
    """A whole number for both axes, or one for each.

    Args:
        value: The value.
        name: What it is, for the message.
        at_least: The smallest that it may be.

    Raises:
        ValueError: If it is neither.
    """
    if type(value) in (tuple, list) and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        least_given, most_given = sorted(value)  # the usual case: a plan may hold hundreds of thousands
        if most_given <= _LARGEST and (at_least is None or least_given >= at_least):
            return value[0], value[1]
    least = "" if at_least is None else f" of at least {at_least}"
    form = f"must be a whole number{least}, or (height, width)"
    height, width = whole_numbers(value, name, form, lengths=[2], alone=2, at_least=at_least)
    return height, width


def sequence(values: Any, name: str, form: str) -> tuple[Any, ...]:
    """Values in an order: a set has none, and a dict or string means something else.

    Args:
        values: The values.
        name: What they are, for the message.
        form: What they should be, for the message.

    Raises:
        ValueError: If they have no order, or are too many to be meant.
    """
    try:
        # One that has no end, or a range of a billion, is not written out to be counted.
        found = None if isinstance(values, str | bytes | Set | Mapping) else tuple(islice(values, _LONGEST + 1))
    except TypeError:
        found = None
    if found is None:
        raise ValueError(f"{name}={shown(values)} {form}")
    if len(found) > _LONGEST:
        raise ValueError(f"{name}={shown(values)} has more than {_LONGEST:,} entries: {form}")
    return found


def instance(value: Any, name: str, kinds: type[T] | tuple[type[T], ...], what: str, advice: str = "") -> T:
    """A value, if it is of the kind that it should be.

    Args:
        value: The value.
        name: What it is, for the message.
        kinds: The class, or the classes, that it should be of.
        what: The same in words.
        advice: What to do otherwise.

    Raises:
        TypeError: If it is of another kind.
    """
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {what}, not {kind(value)}{advice and f': {advice}'}")
    return value


def is_instance_of(value: Any, module: str, name: str) -> bool:
    """Whether an object is of a class of a package that need not be there, and is not imported for that."""
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(value, cls)


def text(value: Any, name: str) -> str:
    """A string, if it can be printed and written to a file.

    Raises:
        TypeError: If it is not a string.
        ValueError: If it holds half of a surrogate pair, which is no character.
    """
    try:
        instance(value, name, str, "a string").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}={shown(ascii(value))} holds what is no character: {error.reason}") from error
    return str(value)


def optional_text(value: Any, name: str) -> str | None:
    """A string as of :func:`text`, or None.

    Raises:
        TypeError: If it is neither.
        ValueError: As :func:`text`.
    """
    return None if value is None else text(instance(value, name, str, "a string or None"), name)


def flag(value: Any, name: str) -> bool:
    """A value, if it is True or False.

    Raises:
        TypeError: If it is neither.
    """
    return instance(value, name, bool, "True or False")


def choice(value: Any, name: str, choices: Sequence[str]) -> None:
    """Check that a value is one of some words.

    Raises:
        ValueError: If it is not.

    >>> choice("odd", "split", ("pow2", "even"))
    Traceback (most recent call last):
    ValueError: split='odd': choose 'pow2' or 'even'
    """
    if not (isinstance(value, str) and value in choices):
        *others, last = map(repr, choices)
        raise ValueError(f"{name}={shown(value)}: choose {', '.join(others)} or {last}")


def mapping(value: Any, name: str, of: str, keys: Collection[str] | None = None) -> dict[str, Any]:
    """A dict with strings for keys.

    Args:
        value: The dict.
        name: What it is, for the message.
        of: What it is a dict of, for the message.
        keys: Those that it may have. Default: any.

    Raises:
        TypeError: If it is not a dict, or has a key that is not a string.
        ValueError: If it has another key, with near misses.
    """
    for key in instance(value, name, Mapping, f"a dict of {of}"):
        instance(key, f"{name}: the key {shown(key)}", str, "a string")
        if keys is not None and key not in keys:
            hint = near_miss(key, keys)
            raise ValueError(f"{name} has no key {key!r}: {hint and f'{hint} '}Its keys are {', '.join(keys)}")
    return dict(value)


def file_to_read(value: Any, name: str, what: str = "the path of a file") -> Path:
    """The path of a file that is there.

    Args:
        value: The path.
        name: What it is, for the message.
        what: What it should be, for the message.

    Raises:
        TypeError: If it is not a path.
        ValueError: If no path can be called so.
        OSError: If there is no such file, or it is a folder.
    """
    path = _path(value, name, what)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{name}={shown(str(value))}: there is no such file")
    return path


def file_to_write(value: Any, name: str) -> Path:
    """The path of a file that can be made, as far as its folder is there.

    Raises:
        TypeError: If it is not a path.
        ValueError: If no path can be called so.
        OSError: If it is a folder, or is in one that does not exist.
    """
    path = _path(value, name, "the path of a file")
    if not os.path.isdir(path.parent):
        raise FileNotFoundError(f"{name}: cannot write {path}, there is no folder {path.parent}")
    return path


def near_miss(word: str, words: Iterable[str], count: int = 1) -> str:
    """Ask whether something like it was meant; empty if there is nothing like it.

    >>> near_miss("stge", ["stage", "top"])
    "did you mean 'stage'?"
    """
    near = difflib.get_close_matches(word, list(words), n=count)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else ""


def kind(value: Any) -> str:
    """What a value is, for a message that says what it should be.

    >>> kind(3), kind(int)
    ('int', 'the class int')
    """
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def shown(value: Any) -> str:
    """A value as a message shows it: not at any length.

    >>> shown((1, 2))
    '(1, 2)'
    """
    try:
        words = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        words = f"a {kind(value)} that is too long to show"
    return words if len(words) <= _SHOWN else f"{words[:_SHOWN]}…"


def _path(value: Any, name: str, what: str) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be {what}, not {kind(value)}")
    path = Path(value)
    if not _may_be_called(path):
        raise ValueError(f"{name}={shown(str(path))} is no path: it holds a character that none may")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{name}={shown(str(value))} is a folder: name a file in it")
    return path


def _may_be_called(path: Path) -> bool:
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
