"""A network written to a file for another program, and checked there against what it computes here."""

import contextlib
import importlib.util
import io
import logging
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from coconv_surgery.deployment.report import DeploymentError
from coconv_surgery.layers.files import whole_file
from coconv_surgery.tracing.differences import difference
from coconv_surgery.tracing.objects import in_short

_ALLOWED = 1e-3  # relative to the largest number


@dataclass(frozen=True)
class ExportedFile:
    """A file that was written and read back.

    Attributes:
        path: The file.
        nodes: Operations in it.
        convolutions: Convolutions among them.
        norms: Norms among them that the running statistics were left in.
        difference: Largest difference between what it and the network compute, relative to the largest number.
        size: Its bytes, and those of weights beside it.
    """

    path: Path
    nodes: int
    convolutions: int
    norms: int
    difference: float
    size: int

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.nodes} nodes ({self.convolutions} convolutions, {self.norms} batch norms), "
            f"{self.size / 1e6:.1f} MB; largest difference {self.difference:.1e}"
        )


def export(network: nn.Module, path: Path, images: torch.Tensor, like: nn.Module | None = None) -> ExportedFile:
    """Write a network to a file: ``.onnx``, ``.pt2`` (torch.export) or ``.xml`` (OpenVINO).

    Args:
        network: What :func:`~coconv_surgery.deploy` makes of a network.
        path: The file. It is written if it computes what the network computes.
        images: Images of the size to export for, ``(N, C, H, W)``.
        like: The network to compare with, in evaluation mode. Default: the one that is written.

    Raises:
        ValueError: If the name tells no known format.
        ModuleNotFoundError: If what writes the format is not installed.
        DeploymentError: If the format does not hold what the network does, or what was written computes something else.
    """
    files = files_of(path)
    form = FORMATS[path.suffix]
    other = torch.rand_like(images)  # what it was not traced with
    with torch.no_grad():
        expected = [tensor for tensor in tree_leaves((like or network)(other)) if isinstance(tensor, torch.Tensor)]
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, path.name)
        try:
            with quietly():
                kinds, found = form.write(network, written, images, other)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # the network's own code, or whatever writes and reads the format
            why = in_short(_root_of(error)).replace(folder, str(path.parent))
            raise DeploymentError(
                f"{path} cannot be written ({why}): try the network in single precision, or another format of "
                f"{', '.join(FORMATS)}"
            ) from error
        if len(found) != len(expected):
            raise DeploymentError(f"{path} would return {len(found)} tensors where the network returns {len(expected)}")
        apart = max(map(difference, found, expected), default=math.nan)
        if not apart <= _ALLOWED:
            raise DeploymentError(f"{path} would compute something else, by {apart:.1e} of the largest number")
        with contextlib.ExitStack() as stack:
            # All are there before the first takes its place.
            passing = [stack.enter_context(whole_file(file, "output")) for file in files]
            for file, target in zip(files, passing, strict=True):
                shutil.copyfile(written.with_suffix(file.suffix), target)
    convolutions, norms = (sum(kind in names for kind in kinds) for names in (form.convolutions, form.norms))
    return ExportedFile(path, len(kinds), convolutions, norms, apart, sum(file.stat().st_size for file in files))


def _root_of(error: BaseException) -> BaseException:
    """What made an exporter fail."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def files_of(path: Path) -> list[Path]:
    """The files that an export to a path writes.

    Raises:
        ValueError: If its suffix tells no format.
        ModuleNotFoundError: If what writes the format is not installed.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} must end with one of {', '.join(FORMATS)}, which tells the format")
    form = FORMATS[path.suffix]
    for package in form.packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"{path} needs {package}, which is not installed", name=package)
    return [path, *(path.with_suffix(suffix) for suffix in form.beside)]


def write_onnx(network: nn.Module, images: torch.Tensor, path: Path) -> None:
    """Write a network of one input as ONNX, in one file."""
    torch.onnx.export(network, (images,), path, input_names=["images"], dynamo=True, external_data=False, verbose=False)


def read_by_openvino(network: nn.Module, images: torch.Tensor) -> Any:
    """OpenVINO's form of a network of one input."""
    import openvino

    return openvino.convert_model(network, example_input=images, input=[tuple(images.shape)])


def _onnx(
    network: nn.Module, path: Path, images: torch.Tensor, other: torch.Tensor
) -> tuple[list[str], list[torch.Tensor]]:
    import onnx
    import onnxruntime

    write_onnx(network, images, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (image,) = session.get_inputs()  # whose name is another one where the network returns it
    found = session.run(None, {image.name: other.numpy()})
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    return kinds, list(map(torch.from_numpy, found))


def _pt2(
    network: nn.Module, path: Path, images: torch.Tensor, other: torch.Tensor
) -> tuple[list[str], list[torch.Tensor]]:
    torch.export.save(torch.export.export(network, (images,)), path)
    exported = torch.export.load(path)
    with torch.no_grad():
        found = exported.module()(other)
    kinds = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    return kinds, [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]


def _openvino(
    network: nn.Module, path: Path, images: torch.Tensor, other: torch.Tensor
) -> tuple[list[str], list[torch.Tensor]]:
    import openvino

    read = read_by_openvino(network, images)
    openvino.save_model(read, path, compress_to_fp16=False)
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = [operation.get_type_name() for operation in read.get_ops()]
    computed = [kind for kind in kinds if kind not in ("Constant", "Parameter", "Result")]
    return computed, [torch.from_numpy(value) for value in compiled(other.numpy()).values()]


@dataclass(frozen=True)
class Format:
    """A format of files.

    Attributes:
        write: Writes a network and reads it back: the kinds of its operations, and what it computes of other images.
        convolutions: Kinds of operations that convolve.
        norms: Kinds that norm by running statistics.
        packages: What writes and reads it, besides torch.
        beside: Suffixes of files beside the one that is named.
    """

    write: Callable[[nn.Module, Path, torch.Tensor, torch.Tensor], tuple[list[str], list[torch.Tensor]]]
    convolutions: frozenset[str]
    norms: frozenset[str]
    packages: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


FORMATS = {
    ".onnx": Format(
        _onnx,
        frozenset({"Conv"}),
        frozenset({"BatchNormalization"}),
        ("onnx", "onnxscript", "onnxruntime"),
    ),
    ".pt2": Format(
        _pt2,
        frozenset({"aten.conv2d.default", "aten.conv2d.padding", "aten.convolution.default"}),
        frozenset({"aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default"}),
    ),
    ".xml": Format(
        _openvino,
        frozenset({"Convolution", "GroupConvolution"}),
        frozenset({"BatchNormInference"}),
        ("openvino",),
        (".bin",),
    ),
}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what exporters say while they work; what they raise says it better."""
    before: Any = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        nowhere = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
