"""ProGAN's networks against their formulas, their growth, their contextual forms, and files of released weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import coconv_surgery as cs
from coconv_surgery.checkpoint import CheckpointError
from coconv_surgery.layers.metadata import PlainWeightsWarning
from coconv_surgery.zoo.equalized import CoEqualizedConv2d, EqualizedConv2d, EqualizedLinear
from coconv_surgery.zoo.progan import (
    Discriminator,
    Generator,
    MinibatchStdDev,
    PixelNorm,
    coprogan,
    discriminator,
    progan,
    widths,
)
from coconv_surgery.zoo.progan_ports import load_released_progan

CHANNELS = (12, 10, 8, 6)  # 4×4 to 32×32
TABLE_2 = {8: (1, 2), 16: (1, 2, 3), 32: (1, 2, 3, 4)}


@pytest.fixture
def generator():
    return randomised(Generator(CHANNELS, latent=7))


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def norm(x):
    return x / (x.pow(2).mean(1, keepdim=True) + 1e-8).sqrt()


def double(x):
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def he(weight, gain_squared=2):
    return weight * math.sqrt(gain_squared) / math.sqrt(weight[0].numel())


def images_by_formula(state, latent):
    """What the reference implementation computes, at every resolution, from nothing but the tensors."""
    dense = state["blocks.0.dense.weight"] * math.sqrt(2) / 4 / math.sqrt(latent.shape[1])
    x = torch.einsum("nl,lchw->nchw", norm(latent), dense) + state["blocks.0.dense.bias"][:, None, None]
    x = norm(F.leaky_relu(x, 0.2))
    found = []
    for index in range(len(CHANNELS)):
        names = ["conv"] if index == 0 else ["conv0", "conv1"]
        x = x if index == 0 else double(x)
        for name in names:
            place = f"blocks.{index}.{name}"
            x = norm(F.leaky_relu(F.conv2d(x, he(state[f"{place}.weight"]), state[f"{place}.bias"], padding=1), 0.2))
        colours = f"to_rgb.{index}"
        found.append(F.conv2d(x, he(state[f"{colours}.weight"], 1), state[f"{colours}.bias"]))
    return found


def test_the_generator_computes_the_reference_formula_at_every_resolution(generator):
    latent = torch.randn(3, 7)
    for index, expected in enumerate(images_by_formula(generator.state_dict(), latent)):
        torch.testing.assert_close(generator(latent, 4 << index), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(generator(latent), expected, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.floats(0, 1), st.sampled_from((8, 16, 32)))
def test_a_fade_mixes_the_image_with_the_one_before(fade, resolution):
    generator = randomised(Generator(CHANNELS, latent=7))
    latent = torch.randn(2, 7)
    before, after = generator(latent, resolution // 2), generator(latent, resolution)
    expected = (1 - fade) * double(before) + fade * after
    torch.testing.assert_close(generator(latent, resolution, fade), expected, rtol=1e-4, atol=1e-4)


def test_a_new_block_that_has_not_faded_in_changes_no_score():
    network = randomised(Discriminator(CHANNELS))
    images = torch.randn(4, 3, 32, 32)
    smaller = F.avg_pool2d(images, 2)
    torch.testing.assert_close(network(images, fade=0.0), network(smaller))
    half = F.leaky_relu(network.from_rgb[2](smaller), 0.2)
    inner = network.blocks[3](F.leaky_relu(network.from_rgb[3](images), 0.2))
    x = 0.5 * half + 0.5 * inner
    for block in reversed(network.blocks[:3]):
        x = block(x)
    torch.testing.assert_close(network(images, fade=0.5), x[:, 0], rtol=1e-4, atol=1e-4)


def test_pixel_norm_gives_every_position_a_mean_square_of_one():
    x = 30 * torch.randn(2, 5, 3, 4)
    assert PixelNorm()(x).square().mean(1) == pytest.approx(1)
    assert torch.equal(PixelNorm()(torch.zeros(1, 3)), torch.zeros(1, 3))


def test_pixel_norm_of_half_precision_neither_overflows_nor_divides_by_zero():
    x = torch.tensor([[1000.0, 1000.0], [0.0, 0.0]], dtype=torch.float16)
    assert torch.equal(PixelNorm()(x), torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float16))


def test_the_spread_of_a_batch_is_taken_over_interleaved_groups_of_four():
    values = torch.tensor([0.0, 10.0, 2.0, 10.0, 0.0, 10.0, 2.0, 10.0])  # even images: spread 1; odd ones: 0
    x = values[:, None, None, None].expand(8, 2, 3, 3)
    added = MinibatchStdDev()(x)[:, 2]
    assert added[:, 0, 0].tolist() == pytest.approx([1, 1e-4] * 4, abs=1e-6)
    assert torch.equal(added, added[:, :1, :1].expand_as(added))


def test_a_batch_that_groups_of_four_do_not_divide_is_named():
    with pytest.raises(ValueError, match=r"a batch of 6 images: .* up to 4, or a multiple of 4"):
        Discriminator((4,))(torch.zeros(6, 3, 4, 4))


@pytest.mark.parametrize(
    "layer", [EqualizedConv2d(64, 64, 3, padding=1), EqualizedConv2d(400, 64, 1, gain=1), EqualizedLinear(600, 64)]
)
def test_an_equalised_layer_keeps_variance_by_its_gain_with_weights_of_variance_one(layer):
    shape = (64, 600) if isinstance(layer, EqualizedLinear) else (16, layer.in_channels, 12, 12)
    gain = 1 if getattr(layer, "kernel_size", None) == (1, 1) else 2
    assert layer.weight.var().item() == pytest.approx(1, rel=0.05)
    output = layer(torch.randn(shape))
    inside = output if output.dim() == 2 else output[..., 1:-1, 1:-1]
    assert inside.var().item() == pytest.approx(gain, rel=0.15)


def test_an_equalised_convolution_becomes_contextual_with_scaled_kernels():
    conv = EqualizedConv2d(6, 5, 3, padding=1)
    weight, x = conv.weight, torch.randn(2, 6, 9, 9)
    cs.to_coconv_(conv, (1, 2), (3, 2))
    assert type(conv) is CoEqualizedConv2d
    assert conv.weight is weight
    scaled = he(weight)
    expected = [F.conv2d(x, scaled[:3], padding=1), F.conv2d(x, scaled[3:], padding=2, dilation=2)]
    torch.testing.assert_close(conv(x), torch.cat(expected, 1))
    kernels = torch.randn_like(scaled)
    torch.testing.assert_close(conv.parameters_for(kernels)["weight"] * conv.scale, kernels)


@pytest.mark.parametrize("fade", [1.0, 0.25])
@pytest.mark.parametrize("resolution", [8, 16, 32])
def test_the_generator_converts_alike_at_every_stage_of_growing(generator, resolution, fade):
    latent = torch.randn(1, 7)
    cs.convert(generator, "resolution", split="even", example_inputs=(latent, resolution, fade))
    whole = coprogan(32, fmap_base=64, fmap_max=8)
    levels = {row.name: row.dilations for row in cs.get_plan(whole).converted}
    grown = {name: dilations for name, dilations in levels.items() if 4 << int(name.split(".")[1]) <= resolution}
    assert {row.name: row.dilations for row in cs.get_plan(generator).converted} == grown
    assert grown == {
        f"blocks.{k}.conv{c}": TABLE_2[4 << k] for k in range(1, 4) if 4 << k <= resolution for c in (0, 1)
    }


def test_converted_as_it_grows_it_ends_as_coprogan(generator):
    for resolution in (4, 8, 16, 32):
        if resolution > 4:
            cs.convert(generator, "resolution", split="even", example_inputs=(torch.randn(1, 7), resolution))
    once = cs.convert(Generator(CHANNELS, latent=7), "resolution", split="even")
    assert [(row.name, row.dilations, row.splits) for row in cs.get_plan(generator).converted] == [
        (row.name, row.dilations, row.splits) for row in cs.get_plan(once).converted
    ]


def test_conversion_keeps_every_parameter_and_changes_the_images(generator):
    before, latent = dict(generator.named_parameters()), torch.randn(2, 7)
    plain = generator(latent)
    cs.convert(generator, "resolution", split="even")
    assert all(parameter is before[name] for name, parameter in generator.named_parameters())
    assert not torch.equal(generator(latent), plain)
    assert torch.equal(cs.revert(generator)(latent), plain)


def test_the_discriminator_converts_as_an_option():
    network = randomised(Discriminator(CHANNELS))
    cs.convert(network, "resolution", split="even")
    assert {row.name: len(row.dilations) for row in cs.get_plan(network).converted} == {
        f"blocks.{k}.conv{c}": k + 1 for k in (1, 2, 3) for c in (0, 1)
    }
    assert network(torch.randn(4, 3, 16, 16), fade=0.5).shape == (4,)


def test_the_networks_for_cifar_10_have_512_channels_throughout():
    assert widths(32) == (512, 512, 512, 512)
    with torch.device("meta"):
        assert progan(32)(torch.empty(1, 512)).shape == (1, 3, 32, 32)
        assert discriminator(32)(torch.empty(4, 3, 32, 32)).shape == (4,)


def test_the_largest_generator_reaches_1024_pixels():
    assert widths(1024) == (512, 512, 512, 512, 256, 128, 64, 32, 16)
    with torch.device("meta"):
        assert coprogan(1024)(torch.empty(1, 512)).shape == (1, 3, 1024, 1024)


def test_a_deployed_coprogan_generates_the_same(generator):
    cs.convert(generator, "resolution", split="even")
    deployed = cs.deploy(generator.eval())
    latent = torch.randn(2, 7)
    torch.testing.assert_close(deployed(latent), generator(latent), rtol=1e-4, atol=1e-5)


# How ports name the n-th layer and the colours of a resolution, weight and bias, and what scale they keep.
PORTS = {
    "genforce": ("layer{n}", "output{k}", ".weight", ".bias", None),
    "InterFaceGAN": ("layer{n}", "output{k}", ".conv.weight", ".wscale.bias", None),
    "prog_gans_pytorch_inference": ("features.{n}", "output", ".conv.weight", ".wscale.b", ".wscale.scale"),
    "GAN dissection": ("layer{n1}", "output_{side}x{side}", ".conv.weight", ".wscale.b", None),
}


def ported(state, port):
    layer, colours, weight, bias, scale = PORTS[port]
    names = ["blocks.0.dense", "blocks.0.conv"]
    names += [f"blocks.{k}.conv{c}" for k in range(1, len(CHANNELS)) for c in (0, 1)]
    places = {name: layer.format(n=n, n1=n + 1) for n, name in enumerate(names)}
    last = len(CHANNELS) - 1
    shown = [last] if port in ("prog_gans_pytorch_inference", "GAN dissection") else range(last + 1)
    places |= {f"to_rgb.{k}": colours.format(k=k, side=4 << k) for k in shown}
    found = {"lod": torch.zeros(())} if port in ("genforce", "InterFaceGAN") else {}
    for name, place in places.items():
        tensor = state[f"{name}.weight"]
        if name == names[0]:
            tensor = tensor.transpose(0, 1).flip(2, 3)
        if scale is not None:  # one of its own beside a weight that is shorter for it
            found[place + scale] = torch.tensor(
                [3.0 * (1 if "rgb" in name else math.sqrt(2)) / tensor[0].numel() ** 0.5]
            )
            tensor = tensor / 3
        found[place + weight], found[place + bias] = tensor, state[f"{name}.bias"]
    return found


@pytest.mark.parametrize("inside", [None, "generator_smooth", "state_dict"])
@pytest.mark.parametrize("port", PORTS)
def test_released_weights_load_from_every_ports_layout(generator, port, inside, tmp_path):
    content = ported(generator.state_dict(), port)
    torch.save(content if inside is None else {inside: content, "other": 1}, tmp_path / "port.pth")
    loaded = randomised(Generator(CHANNELS, latent=7))
    load_released_progan(loaded, tmp_path / "port.pth")
    latent = torch.randn(2, 7)
    torch.testing.assert_close(loaded(latent), generator(latent), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "latent", "message"),
    [
        (CHANNELS[:3], 7, "holds more than a generator for 16×16 pixels has: layer6.weight|output3.weight"),
        ((*CHANNELS, 4), 7, "has no 'layer8.weight', which a generator for 64×64 pixels needs"),
        (
            (16, *CHANNELS[1:]),
            7,
            r"layer0.weight is of the shape \(7, 12, 4, 4\) in the file \(genforce\), and of \(7, 16",
        ),
        (CHANNELS, 9, r"layer0.weight is of the shape \(7, 12, 4, 4\) .* and of \(9, 12, 4, 4\)"),
    ],
)
def test_released_weights_of_another_resolution_or_width_are_refused(generator, channels, latent, message, tmp_path):
    torch.save(ported(generator.state_dict(), "genforce"), tmp_path / "port.pth")
    other = Generator(channels, latent)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_released_progan(other, tmp_path / "port.pth")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_released_weights_in_a_contextual_generator_warn_as_plain_ones_do(generator, tmp_path):
    torch.save(ported(generator.state_dict(), "genforce"), tmp_path / "port.pth")
    with pytest.warns(PlainWeightsWarning):
        load_released_progan(
            cs.convert(Generator(CHANNELS, latent=7), "resolution", split="even"), tmp_path / "port.pth"
        )


def test_released_weights_that_have_not_fully_grown_are_refused(generator, tmp_path):
    torch.save({**ported(generator.state_dict(), "genforce"), "lod": torch.tensor(1.5)}, tmp_path / "port.pth")
    with pytest.raises(ValueError, match=r"a generator that has not fully grown: its lod is 1\.5, not 0"):
        load_released_progan(generator, tmp_path / "port.pth")


def test_a_layout_that_computes_something_else_is_refused(generator, tmp_path):
    torch.save({"netG": {"formatLayer.module.weight": torch.zeros(1)}}, tmp_path / "zoo.pth")
    with pytest.raises(CheckpointError, match=r"layout of a port of ProGAN's release that is known: genforce, Inter"):
        load_released_progan(generator, tmp_path / "zoo.pth")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: progan(48), "resolution=48 must be 4, 8, 16, …, 1024: a power of two"),
        (lambda: progan(2048), "resolution=2048 must be 4"),
        (lambda: progan(1024, fmap_base=128), "fmap_base=128 leaves no channels at 1024×1024 pixels: take more"),
        (lambda: progan(8, fmap_max=0), "fmap_max=0 must be at least 1"),
        (lambda: Generator((8,), 4)(torch.zeros(1, 4), 8), "resolution=8: the network grows up to 4×4 pixels"),
        (lambda: Generator((8,), 4)(torch.zeros(1, 4), fade=1.5), "fade=1.5 must be from 0 to 1"),
        (lambda: Generator((8,), 4)(torch.zeros(1, 4), fade="x"), "fade must be a number from 0 to 1, not str"),
        (
            lambda: Generator((8,) * 10),
            "channels=.* must be numbers of at least 1, one for each of up to 9 resolutions",
        ),
        (lambda: Discriminator((8,))(torch.zeros(4, 3, 8, 8)), "resolution=8: the network grows up to 4×4 pixels"),
        (lambda: Discriminator((8,))(torch.zeros(4, 3, 4, 8)), "images of 4×8 pixels: the discriminator takes squares"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
