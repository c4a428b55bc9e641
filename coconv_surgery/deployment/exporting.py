"""A network written to a file for another program, and checked there against what it computes here."""

import contextlib
import io
import logging
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

from coconv_surgery.deployment.kernels import difference
from coconv_surgery.deployment.report import DeploymentError
from coconv_surgery.layers.files import whole_file

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
        DeploymentError: If what was written computes something else.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} must end with one of {', '.join(FORMATS)}, which tells the format")
    write, weights = FORMATS[path.suffix]
    other = torch.rand_like(images)  # what it was not traced with
    with torch.no_grad():
        expected = [tensor for tensor in tree_leaves((like or network)(other)) if isinstance(tensor, torch.Tensor)]
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, path.name)
        with quietly():
            kinds, found = write(network, written, images, other)
        apart = max((difference(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
        if not apart <= _ALLOWED:
            raise DeploymentError(f"{path} would compute something else, by {apart:.1e} of the largest number")
        files = [(written, path), *((written.with_suffix(suffix), path.with_suffix(suffix)) for suffix in weights)]
        for source, target in files:
            with whole_file(target, "output") as passing:
                shutil.copyfile(source, passing)
    convolutions, norms = (sum(name in kind.lower() for kind in kinds) for name in ("conv", "norm"))
    return ExportedFile(path, len(kinds), convolutions, norms, apart, sum(target.stat().st_size for _, target in files))


def _onnx(
    network: nn.Module, path: Path, images: torch.Tensor, other: torch.Tensor
) -> tuple[list[str], list[torch.Tensor]]:
    import onnx
    import onnxruntime

    torch.onnx.export(network, (images,), path, input_names=["images"], dynamo=True, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": other.numpy()})
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

    read = openvino.convert_model(network, example_input=images, input=[tuple(images.shape)])
    openvino.save_model(read, path, compress_to_fp16=False)
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = [operation.get_type_name() for operation in read.get_ops()]
    computed = [kind for kind in kinds if kind not in ("Constant", "Parameter", "Result")]
    return computed, [torch.from_numpy(value) for value in compiled(other.numpy()).values()]


_Write = Callable[[nn.Module, Path, torch.Tensor, torch.Tensor], tuple[list[str], list[torch.Tensor]]]
# How each format is written and read back, and what lies beside such a file.
FORMATS: dict[str, tuple[_Write, tuple[str, ...]]] = {
    ".onnx": (_onnx, ()),
    ".pt2": (_pt2, ()),
    ".xml": (_openvino, (".bin",)),
}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what exporters say while they work."""
    before: Any = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
