"""The one reader of weight files: nothing in a file is executed, and every size is checked before memory is spent."""

import io
import mmap
import pickle
import struct
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, cast
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from coconv_surgery.checkpoint.naming import fit, prefix_of, without
from coconv_surgery.checkpoint.pickles import ALLOWED, Pickle, RefusedError
from coconv_surgery.layers.arguments import file_to_read, kind, shown

# Where training scripts keep the weights in what they save, averages first, as timm looks for them.
STATES = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
# What torch raises on a file that is damaged.
_UNREADABLE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, NotImplementedError, OSError),
    *(RuntimeError, TypeError, ValueError),
    *(pickle.UnpicklingError, struct.error, BadZipFile, SafetensorError),
)
_ADVICE = "copy or download it again"
_JSON = "is JSON, not weights: a plan is applied by apply_plan(model, Plan.from_json(path))"
_SCRIPTED = "is a TorchScript archive, which is code: save the state_dict() of the network"
_EXPORTED = "is a program of torch.export, which torch.export.load() reads: save the state_dict() of the network"
# What else torch writes as zip files is known by these in it; the last is in older ones.
_OF_OTHERS = {
    "constants.pkl": _SCRIPTED,
    "archive_format": _EXPORTED,
    "serialized_exported_program.json": _EXPORTED,
}
# Of a zip file without a comment: a fixed record, before which those of a large file have two more.
_END, _END_SIZE = b"PK\5\6", 22
_LOCATOR, _LOCATOR_SIZE, _LARGE_END_SIZE = b"PK\6\7", 20, 56


class CheckpointError(ValueError):
    """A file of weights that cannot be read, or claims more than it holds."""


def read_weights(path: str | Path) -> dict[str, Any]:
    """Read tensors by name, as timm would.

    Those of the first entry of :data:`STATES` are taken, or of the one entry that holds some, and what ``DataParallel``
    and ``torch.compile`` put before all names is taken off.

    Args:
        path: A file that ``torch.save`` wrote, or a safetensors file.

    Raises:
        TypeError: If it is not a path.
        CheckpointError: As :func:`read_checkpoint`, or if what it holds has no names.
        OSError: If it cannot be opened.
    """
    return weights_in(read_checkpoint(path), path)


def weights_in(content: Mapping[Any, Any], path: str | Path, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The tensors by name in what :func:`read_checkpoint` has read, as :func:`read_weights` gives them.

    Args:
        content: What was read.
        path: The file.
        own: The weights of the network that they are for: those of the entry that fits it best are taken, and what is
            put before all names is taken off where the rest are the network's, whoever has put it there.

    Returns:
        The tensors, with the versions of the modules that they come from as torch keeps them beside a state dict.

    Raises:
        CheckpointError: If it holds none, or several that fit alike, or what it holds has no names.
    """
    weights = state_in(content, path, own)
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{path} holds a {kind(weights)} where its weights should be, not tensors by name")
    for name in weights:
        if not isinstance(name, str):
            raise CheckpointError(f"{path} holds something under {shown(name)}, not a tensor by name")
    prefix = prefix_of(weights, own)
    found = OrderedDict(without(prefix, weights))
    if versions := _versions(weights, prefix):
        cast(Any, found)._metadata = versions
    return found


def state_in(content: Mapping[Any, Any], path: str | Path, own: Mapping[str, Any] | None = None) -> Any:
    """The state dict in what was saved, with the names that it was saved with.

    Args:
        content: What was read.
        path: The file.
        own: As of :func:`weights_in`. Without it, the one with the most tensors is taken.

    Raises:
        CheckpointError: If it holds several that fit alike.
    """
    if usual := usual_states(content):
        return usual[0]
    states = states_elsewhere(content)
    if not states:
        # A tensor of such a name is one of the weights.
        odd = (content[key] for key in STATES if content.get(key) is not None and not torch.is_tensor(content[key]))
        return next(odd, content)
    if any(map(torch.is_tensor, content.values())):
        states[None] = {name: value for name, value in content.items() if isinstance(name, str)}
    fits = {key: (len(state),) if own is None else fit(state, own) for key, state in states.items()}
    best = [key for key in states if fits[key] == max(fits.values())]
    if own is not None and len(best) > 1:
        places = " and ".join("at its top" if key is None else f"under {shown(key)}" for key in best)
        raise CheckpointError(
            f"{path} holds weights {places} that fit alike: save those that are meant alone, or give them to "
            "plan_of(), apply_plan() and load_state_dict()"
        )
    return content if best[0] is None else states[best[0]]


def usual_states(content: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    """State dicts under the names that timm knows, in the order in which it looks for them."""
    return [content[key] for key in STATES if _is_state(content.get(key))]


def states_elsewhere(content: Mapping[Any, Any]) -> dict[Any, Mapping[str, Any]]:
    """State dicts under other names."""
    return {
        key: value
        for key, value in content.items()
        if key not in STATES and _is_state(value) and all(isinstance(name, str) for name in value)
    }


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(map(torch.is_tensor, value.values()))


def _versions(weights: Mapping[str, Any], prefix: str) -> dict[str, dict[str, Any]]:
    """What tells modules how old their weights are, by the names that are left of theirs."""
    noted = getattr(weights, "_metadata", None)
    if not isinstance(noted, Mapping):
        return {}
    versions = {
        f"{name}." if name else "": {"version": part["version"]}
        for name, part in noted.items()
        if isinstance(name, str) and isinstance(part, Mapping) and isinstance(part.get("version"), int)
    }
    return {name.removesuffix("."): part for name, part in without(prefix, versions).items()}


def read_checkpoint(path: str | Path) -> dict[Any, Any]:
    """Read what was saved, as it was saved.

    The tensors of a torch file, unless its format is that of torch before 1.6, and of a safetensors file stay in the
    file until they are used: it must not be written to meanwhile.

    Args:
        path: A file that ``torch.save`` wrote, or a safetensors file.

    Returns:
        The dict that was saved, or the tensors of a safetensors file by name.

    Raises:
        TypeError: If it is not a path.
        CheckpointError: If it is not complete, holds more than weights, or claims more than it holds.
        OSError: If it cannot be opened.
    """
    path = file_to_read(path, "path")
    with path.open("rb") as file:  # one that cannot be opened is not a damaged one
        start, size = file.read(2), path.stat().st_size
    form = "checkpoint"
    try:
        if is_safetensors(path):
            form = "safetensors file"
            return load_file(str(path))
        if start[:1] == b"{":
            raise RefusedError(_JSON)
        if zipped := start == b"PK":
            _check_zip(path, size)
        else:
            _check_pickles(path, size)
        content = _load(path, zipped)
    except RefusedError as error:
        raise CheckpointError(f"{path} {error}") from error
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} is not a complete {form}: {_ADVICE}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {kind(content)}, not tensors by name: save a state_dict()")
    return content


def is_safetensors(path: str | Path) -> bool:
    """Whether a file is a safetensors file, or is called one."""
    with open(path, "rb") as file:
        return Path(path).suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _load(path: Path, zipped: bool) -> Any:
    safe = getattr(torch.serialization, "safe_globals", None)
    with safe(ALLOWED) if safe is not None else nullcontext():
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)


def _check_zip(path: Path, size: int) -> None:
    _check_end(path, size)
    with ZipFile(path) as file:
        entries = file.infolist()
        names = [entry.filename for entry in entries]
        folder = names[0].partition("/")[0]
        if others := {name.removeprefix(f"{folder}/") for name in names} & _OF_OTHERS.keys():
            raise RefusedError(_OF_OTHERS[others.pop()])
        if any(entry.compress_type != ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
            raise RefusedError("is compressed, which torch.save() does not do: unpack it, and save it anew")
        if sum(entry.file_size for entry in entries) > size:
            raise RefusedError("claims to be larger than it is")
        if len({*names}) < len(names) or min(entry.header_offset for entry in entries):
            raise RefusedError("is a zip file that torch.save() did not write: save it anew")
        prefix = f"{folder}/data/"
        records = {entry.filename.removeprefix(prefix): entry.file_size for entry in entries}
        Pickle(size, records).follow(io.BytesIO(file.read(f"{folder}/data.pkl")))


def _check_end(path: Path, size: int) -> None:
    """See to it that there is one way to read the directory of a zip file: torch and Python look for it differently."""
    with path.open("rb") as file:
        file.seek(max(0, size - _END_SIZE - _LOCATOR_SIZE))
        locator, end = file.read(_LOCATOR_SIZE), file.read()
    if not end.startswith(_END):
        raise ValueError("the directory is not at the end")
    (large_end,) = struct.unpack("<8xQ4x", locator)
    if locator.startswith(_LOCATOR) and large_end != size - _END_SIZE - _LOCATOR_SIZE - _LARGE_END_SIZE:
        raise RefusedError("has two directories")


def _check_pickles(path: Path, size: int) -> None:
    # Mapped, as a file would set aside whatever number of bytes it is asked to read.
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        pickles = Pickle(size)
        # A number that says what it is, the version, the machine, what was saved, and the storages that follow.
        for _ in range(5):
            pickles.follow(cast(BinaryIO, file))
