"""ProGAN's released weights, in the files of their usual PyTorch ports.

The release is of TensorFlow. Those who brought it to PyTorch named and scaled its tensors in their own ways; the
layouts here are of ports that compute what the release computes: genforce, InterFaceGAN and HiGAN, ptrblck's
``prog_gans_pytorch_inference``, and GAN dissection. The last two keep the colours of the largest resolution alone.

Not among them are networks that others trained, which compute something else: those of ``pytorch_GAN_zoo`` (biases
scaled with the weights, a bias for every position of the 4×4 map), of ``pro_gan_pytorch`` (no norm behind the first
layer) and of mmagic (another norm, and other scales of fused layers).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from coconv_surgery.checkpoint.reading import CheckpointError, read_checkpoint, weights_in
from coconv_surgery.checkpoint.tensors import check_loadable
from coconv_surgery.layers.arguments import file_to_read, instance
from coconv_surgery.zoo.equalized import EqualizedConv2d
from coconv_surgery.zoo.progan import Generator

# Where a file has several generators: the averaged one, then the one that was trained.
_GENERATORS = ("generator_smooth", "generator")
_GROWN = "lod"  # by how many resolutions it had not grown yet


class _Layout(NamedTuple):
    """How a port names its tensors.

    Attributes:
        port: Whose it is.
        layer: Name of the n-th layer, from 0.
        colours: Name of the layer for colours at a resolution, given its index and side.
        weight: What follows for the weight.
        bias: What follows for the bias.
        scale: What follows for the factor that the weight is multiplied with. None: He's constant, as here.
        last_alone: Whether colours are those of the largest resolution alone.
    """

    port: str
    layer: str
    colours: str
    weight: str
    bias: str
    scale: str | None = None
    last_alone: bool = False


_LAYOUTS = (
    _Layout("genforce", "layer{n}", "output{index}", ".weight", ".bias"),
    _Layout("InterFaceGAN", "layer{n}", "output{index}", ".conv.weight", ".wscale.bias"),
    _Layout(
        "prog_gans_pytorch_inference",
        "features.{n}",
        "output",
        ".conv.weight",
        ".wscale.b",
        ".wscale.scale",
        last_alone=True,
    ),
    _Layout("GAN dissection", "layer{n1}", "output_{side}x{side}", ".conv.weight", ".wscale.b", last_alone=True),
)


def load_released_progan(generator: Generator, path: str | Path) -> None:
    """Load released weights of ProGAN's generator from a file of a port.

    No code in the file is executed. Where a port has colours at the largest resolution alone, the others stay as they
    are, and the generator is right when it is fully grown.

    Args:
        generator: A generator of the same resolution and widths, such as ``progan(1024)`` for CelebA-HQ.
        path: A file that ``torch.save`` wrote.

    Raises:
        TypeError: If ``generator`` is not one, or ``path`` not a path.
        CheckpointError: If the file cannot be read, or its layout is none of these.
        ValueError: If it holds a generator of another resolution or width; nothing has changed then.
        OSError: If it cannot be opened.
    """
    instance(generator, "generator", Generator, "a Generator of coconv_surgery.zoo.progan")
    path = file_to_read(path, "path")
    content = read_checkpoint(path)
    inner = next((content[key] for key in _GENERATORS if isinstance(content.get(key), Mapping)), content)
    weights = weights_in(inner, path)
    layout = next((layout for layout in _LAYOUTS if all(name in weights for name in _names(layout, 1))), None)
    if layout is None:
        ports = ", ".join(layout.port for layout in _LAYOUTS)
        raise CheckpointError(f"{path} does not have the layout of a port of ProGAN's release that is known: {ports}")
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path} holds something under {name} that is not a tensor")
    if (left := weights.pop(_GROWN, torch.zeros(()))).any():
        raise ValueError(f"{path} holds a generator that has not fully grown: its lod is {left.tolist()}, not 0")
    state = dict(generator.state_dict())  # without what that says of levels: the file says nothing
    state.update(_translated(generator, weights, layout))
    if weights:
        raise ValueError(f"{path} ({layout.port}) holds more than {_described(generator)} has: {next(iter(weights))}")
    check_loadable(generator, state, path)
    generator.load_state_dict(state)


def _translated(generator: Generator, weights: dict[str, Any], layout: _Layout) -> dict[str, torch.Tensor]:
    """Our state dict of a port's weights, which are taken out."""
    layers = [name for name, module in generator.blocks.named_modules(prefix="blocks") if hasattr(module, "scale")]
    places = [(layer, *_names(layout, n)) for n, layer in enumerate(layers)]
    colours = list(enumerate(generator.to_rgb))
    for index, _ in colours[-1:] if layout.last_alone else colours:
        place = layout.colours.format(index=index, side=4 << index)
        places.append((f"to_rgb.{index}", f"{place}{layout.weight}", f"{place}{layout.bias}"))
    found = {}
    for name, weight_name, bias_name in places:
        layer = cast(EqualizedConv2d, generator.get_submodule(name))
        try:
            weight, bias = weights.pop(weight_name), weights.pop(bias_name)
            if layout.scale is not None:
                weight = weight * (weights.pop(weight_name.removesuffix(layout.weight) + layout.scale) / layer.scale)
        except KeyError as error:
            raise ValueError(f"the file ({layout.port}) has no {error}, which {_described(generator)} needs") from None
        if name == layers[0]:  # theirs convolves a map of one pixel, padded by three
            weight = weight.flip(2, 3).transpose(0, 1)
        if weight.shape != layer.weight.shape:
            raise ValueError(
                f"{weight_name} is of the shape {tuple(weight.shape)} in the file ({layout.port}), and of "
                f"{tuple(layer.weight.shape)} in {_described(generator)}: give the generator the file's widths"
            )
        found[f"{name}.weight"], found[f"{name}.bias"] = weight.contiguous(), bias
    return found


def _names(layout: _Layout, n: int) -> tuple[str, str]:
    place = layout.layer.format(n=n, n1=n + 1)
    return f"{place}{layout.weight}", f"{place}{layout.bias}"


def _described(generator: Generator) -> str:
    return f"a generator for {generator.resolution}×{generator.resolution} pixels"
