"""The header of a safetensors file: a plan, and what is no tensor."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from coconv_surgery.checkpoint.reading import CheckpointError
from coconv_surgery.layers.arguments import file_to_read, kind, mapping, shown, text
from coconv_surgery.planning import notes
from coconv_surgery.planning.plan import Plan, read_plan_text

_PLAN = notes.KEY
_SHARED = "coconv_shared"
_EXTRA = "coconv_extra_state"
_NETWORK = "coconv_network"
_VERSIONS = "coconv_versions"


def write_header(
    plan: Plan,
    shared: Mapping[str, str],
    extra: Mapping[str, Any],
    network: Mapping[str, Any] | None = None,
    versions: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """Make the header of a file.

    Args:
        plan: The plan of the network whose weights it holds.
        shared: Names of tensors that are written under another name, which they stand for here.
        extra: What else the state dict holds, see :func:`is_json`.
        network: What the network is, see :func:`check_network`.
        versions: What torch notes of modules beside their weights, by name.
    """
    values = {_SHARED: shared, _EXTRA: extra, _NETWORK: network, _VERSIONS: versions}
    return {_PLAN: plan.to_json(), **{key: json.dumps(value) for key, value in values.items() if value}}


def read_header(path: str | Path) -> dict[str, str]:
    """Read what a safetensors file holds besides tensors.

    Raises:
        TypeError: If it is not a path.
        CheckpointError: If it is not a safetensors file.
        OSError: If it cannot be read.
    """
    path = file_to_read(path, "path")
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error


def plan_in_header(header: Mapping[str, str], path: str | Path) -> Plan | None:
    """The plan in a safetensors file's header, if there is one.

    Raises:
        PlanError: If it cannot be read.
    """
    return read_plan_text(header[_PLAN], f"the plan in {path}") if _PLAN in header else None


def check_network(value: Any, name: str) -> dict[str, Any]:
    """Check what says of which network the weights of a file are.

    Args:
        value: A dict of the ``target`` that names it on the command line, and the ``arguments`` to build it with.
        name: What it is, for the message.

    Raises:
        TypeError: If it is not that.
        ValueError: If it has other keys, or arguments that are not JSON.
    """
    network = mapping(value, name, "target and arguments", keys=("target", "arguments"))
    text(network.get("target"), f"{name}: target")
    if not is_json(mapping(network.setdefault("arguments", {}), f"{name}: arguments", "values by name")):
        raise ValueError(f"{name}: arguments: a file has place for text, numbers, and lists and dicts of them that end")
    return network


def network_in_header(header: Mapping[str, str], path: str | Path) -> dict[str, Any] | None:
    """What a file says of its network, as :func:`check_network` has it; None if it does not.

    Raises:
        CheckpointError: If it says something else.
    """
    if _NETWORK not in header:
        return None
    try:
        return check_network(_read(header, _NETWORK, path), _NETWORK)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def beside_tensors(header: Mapping[str, str], tensors: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """What a state dict holds besides the tensors of a file: those under a second name, and what is no tensor.

    Raises:
        CheckpointError: If the header does not say it in the way of :func:`write_header`.
    """
    shared = _read(header, _SHARED, path)
    if lost := [name for name in shared.values() if not isinstance(name, str) or name not in tensors]:
        raise CheckpointError(f"{path} shares tensors that it does not hold, as {shown(lost[0])}")
    extra = _read(header, _EXTRA, path)
    if twice := sorted((shared.keys() & extra.keys()) | (tensors.keys() & {*shared, *extra})):
        raise CheckpointError(
            f"{path} holds {shown(twice[0])} twice, once in its header: it must say what that is once"
        )
    return {alias: tensors[name] for alias, name in shared.items()} | extra


def versions_in_header(header: Mapping[str, str], path: str | Path) -> dict[str, int]:
    """The versions of modules that a file's weights come from, by name.

    Raises:
        CheckpointError: If the header does not say it in the way of :func:`write_header`.
    """
    versions = _read(header, _VERSIONS, path)
    if any(type(version) is not int for version in versions.values()):
        raise CheckpointError(f"{path}: {_VERSIONS} in the header are not whole numbers by name")
    return versions


def is_json(value: Any) -> bool:
    """Whether a value is the same after it has been JSON."""
    try:
        return _alike(value, json.loads(json.dumps(value)))
    except (RecursionError, TypeError, ValueError):  # nested without an end, for one
        return False


def _alike(value: Any, other: Any) -> bool:
    if type(value) is not type(other):
        return False
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(_alike(value[key], other[key]) for key in value)
    return not isinstance(value, list) or all(map(_alike, value, other))


def _read(header: Mapping[str, str], key: str, path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(header.get(key, "{}"))
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{path}: {key} in the header is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: {key} in the header is {kind(content)}, not values by name")
    return content
