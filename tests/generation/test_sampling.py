"""Pictures of what a checkpoint's generator makes, and the commands that draw and score them."""

import numpy as np
import pytest
import torch
from PIL import Image

import coconv_surgery as cs
from coconv_surgery.checkpoint import CheckpointError
from coconv_surgery.generation.sampling import Grown, grid, load_grown
from coconv_surgery.layers.metadata import PlainWeightsWarning
from coconv_surgery.zoo.progan import Generator, coprogan


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    generator = coprogan(16, fmap_base=64, fmap_max=8)
    torch.save(generator.state_dict(), tmp_path / "generator.pth")
    return tmp_path / "generator.pth"


def test_a_state_dict_of_a_generator_gives_it_back_with_its_levels(file):
    grown = load_grown(file)
    assert (grown.resolution, grown.fade, grown.images_seen) == (16, 1, None)
    assert len(cs.get_plan(grown.generator).converted) == 4


@pytest.mark.parametrize("guarded", [False, True])
def test_a_file_of_save_converted_gives_its_generator_back(file, tmp_path, guarded):
    generator = load_grown(file).generator
    cs.save_converted(generator, tmp_path / "generator.safetensors", guard=guarded)
    found = load_grown(tmp_path / "generator.safetensors").generator
    latents = torch.randn(2, 8)
    assert torch.equal(found(latents), generator(latents))


def test_weights_that_say_nothing_are_taken_to_be_plain_with_a_warning(file, tmp_path):
    torch.save(dict(torch.load(file)), tmp_path / "bare.pth")
    with pytest.warns(PlainWeightsWarning, match="does not say whether its generator was converted"):
        load_grown(tmp_path / "bare.pth")


def test_a_plain_generator_stays_plain(tmp_path):
    torch.save(Generator((8, 8), 8).state_dict(), tmp_path / "plain.pth")
    assert not cs.get_plan(load_grown(tmp_path / "plain.pth").generator).converted


def test_images_depend_on_the_seed_alone(file):
    grown = load_grown(file)
    batches = list(grown.images(40, seed=3))
    assert [len(batch) for batch in batches] == [32, 8]
    assert torch.equal(torch.cat(batches), torch.cat(list(grown.images(40, seed=3))))
    assert not torch.equal(batches[0], next(grown.images(32, seed=4)))


def test_a_grid_has_every_image_and_small_ones_enlarged():
    images = torch.arange(5 * 3 * 16, dtype=torch.uint8).view(5, 3, 4, 4)
    picture = grid(images)
    assert picture.shape == (2 * 34 + 2, 3 * 34 + 2, 3)
    assert np.array_equal(picture[2:34:8, 36:68:8], images[1].permute(1, 2, 0).numpy())


def test_generate_draws_a_grid(coconv, file, tmp_path):
    picture = tmp_path / "grid.png"
    code, out, err = coconv("generate", file, "-o", picture, "--images", 9, "--seed", 5)
    assert (code, err) == (0, "")
    assert out == f"{picture}: 9 images of 16×16 pixels\n"
    expected = grid(torch.cat(list(load_grown(file).images(9, seed=5))))
    assert np.array_equal(np.asarray(Image.open(picture)), expected)


def test_evaluate_gan_prints_the_columns_of_table_7(coconv, file, drawn):
    code, out, _ = coconv("evaluate-gan", file, "--data", drawn / "val", "--count", 8)
    assert code == 0
    said, _, header, _, values = out.splitlines()
    assert said == f"{file}: images of 16×16 pixels, 12 real ones"
    assert header.split("  ") == ["SWD×10³ 16", "SWD×10³ average"]
    assert all(float(value) > 0 for value in values.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "real images: give either --data FOLDER or --cifar10 FOLDER"),
        (("--data", "{drawn}/val", "--score", "kid"), "--score='kid': choose 'swd', 'ms-ssim', 'fid' or 'is'"),
        (("--data", "{drawn}/val", "--score", "fid"), "FID and IS need Inception's weights: get https://"),
        (("--data", "{drawn}/annotations"), "has no images"),
        (("--cifar10", "{drawn}"), "does not hold CIFAR-10"),
        (("--data", "{drawn}/val", "--crop", "0,0,60,60"), "has 60×60 pixels: resolution=16 takes squares"),
        (
            ("--data", "{drawn}/val", "--count", "14"),
            "count=14 must be even, and at most the number",
        ),
        (("--cifar10", "{drawn}", "--crop", "0,0,8,8"), "--crop is for the images of a folder"),
    ],
)
def test_what_cannot_be_evaluated_is_one_message(coconv, file, drawn, arguments, message):
    code, out, err = coconv("evaluate-gan", file, *(argument.format(drawn=drawn) for argument in arguments))
    assert code != 0
    assert out == ""
    assert message in err.replace("\n", " ")


@pytest.mark.parametrize("name", ["grid.psd", "grid.xyz", "grid"])
def test_a_name_that_is_none_of_a_picture_is_refused(coconv, file, tmp_path, name):
    code, _, err = coconv("generate", file, "-o", tmp_path / name)
    assert (code, err) == (1, f"coconv: {tmp_path / name}: name a picture, such as grid.png\n")
    assert not (tmp_path / name).exists()


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not hold a generator of ProGAN: give a checkpoint of a training"):
        load_grown(tmp_path / "other.pth")


def test_a_fade_in_is_drawn_as_it_stands(file, tmp_path):
    generator = load_grown(file).generator
    half, whole = (next(Grown(generator, 16, fade, None).images(4)) for fade in (0.5, 1.0))
    assert not torch.equal(half, whole)
