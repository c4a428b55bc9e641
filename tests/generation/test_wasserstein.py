"""The sliced Wasserstein distance, on cases that can be worked out by hand and against scipy."""

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coconv_surgery.generation.wasserstein import PatchSet, distance, laplacian_pyramid, sliced_wasserstein


def sets(*batches: torch.Tensor) -> list[PatchSet]:
    found = []
    for images in batches:
        found.append(PatchSet())
        for part in images.split(3):
            found[-1].add(part)
    return found


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_in_one_dimension_it_is_scipys_wasserstein_distance(seed):
    rng = np.random.default_rng(seed)
    ones, others = rng.normal(size=50), rng.normal(1, 3, size=50)
    points = [torch.from_numpy(each)[:, None] for each in (ones, others)]
    assert distance(*points) == pytest.approx(scipy.stats.wasserstein_distance(ones, others))


def test_a_shift_counts_by_its_mean_length_along_a_direction():
    points = torch.randn(40, 3, dtype=torch.float64)
    shift = torch.tensor([0.0, 4.0, 0.0], dtype=torch.float64)
    # The mean of |cos| over the directions of space is a half.
    assert distance(points, points + shift) == pytest.approx(2, rel=0.1)


def test_the_order_of_points_does_not_matter():
    points = torch.randn(30, 5)
    assert distance(points, points[torch.randperm(30)]) == 0


def test_the_pyramid_blurs_and_enlarges_as_scipy_does_and_adds_up():
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    row = np.array([1, 4, 6, 4, 1]) / 16
    kernel = np.outer(row, row)[None, None]
    levels = laplacian_pyramid(images, 16)
    assert [level.shape[-1] for level in levels] == [64, 32, 16]
    current = images.numpy()
    for level in levels[:-1]:
        smaller = scipy.ndimage.convolve(current, kernel, mode="mirror")[..., ::2, ::2]
        spread = np.zeros_like(current)
        spread[..., ::2, ::2] = smaller
        enlarged = scipy.ndimage.convolve(spread, 4 * kernel, mode="mirror")
        np.testing.assert_allclose(level.numpy(), current - enlarged, atol=1e-12)
        current = smaller
    np.testing.assert_allclose(levels[-1].numpy(), current, atol=1e-12)


def test_patches_are_windows_of_their_images():
    images = torch.arange(256.0).view(1, 1, 16, 16) + 1000 * torch.arange(2.0)[:, None, None, None]
    (patches,) = sets(images.expand(-1, 3, -1, -1))
    raw = torch.cat(patches._found[16])
    window = (torch.arange(7)[:, None] * 16 + torch.arange(7)).flatten()
    assert torch.equal(raw - raw[:, :, :1], window.expand_as(raw).float())
    corners = raw[:, 0, 0]
    assert set((corners // 1000).tolist()) == {0, 1}
    places = corners % 1000
    assert (places % 16).max() == places.div(16, rounding_mode="floor").max() == 9
    assert places.min() >= 0


def test_patches_have_mean_0_and_deviation_1_in_each_colour():
    (patches,) = sets(torch.rand(6, 3, 16, 16) * torch.tensor([1.0, 9.0, 0.1])[:, None, None] + 5)
    colours = patches.take(16).view(-1, 3, 49)
    assert colours.mean((0, 2)).abs().max() < 1e-3
    assert colours.std((0, 2)) == pytest.approx(1, abs=1e-4)


def test_brightness_and_contrast_do_not_matter_and_texture_does():
    images = torch.rand(30, 3, 32, 32)
    same = sliced_wasserstein(*sets(images, 0.3 * images + 0.5))
    assert max(same.values()) < 1e-3
    smooth = torch.nn.functional.avg_pool2d(images, 5, 1, 2)
    other = sliced_wasserstein(*sets(images, smooth))
    assert list(other) == [32, 16]
    assert min(other.values()) > 0.05


def test_images_of_one_colour_have_a_distance_too():
    found = sliced_wasserstein(*sets(torch.rand(4, 3, 16, 16), torch.full((4, 3, 16, 16), 0.5)))
    assert np.isfinite(found[16])
    assert found[16] > 0.1


@pytest.mark.parametrize(("ones", "others"), [((4, 3, 16, 16), (5, 3, 16, 16)), ((4, 3, 16, 16), (4, 3, 32, 32))])
def test_sets_that_differ_in_size_are_named(ones, others):
    with pytest.raises(ValueError, match="give equally many images of one size"):
        sliced_wasserstein(*sets(torch.rand(ones), torch.rand(others)))
    with pytest.raises(ValueError, match="give equally many images of one size"):
        sliced_wasserstein(PatchSet(), PatchSet())


@pytest.mark.parametrize("size", [(8, 8), (16, 32)])
def test_images_that_are_too_small_or_not_square_are_named(size):
    with pytest.raises(ValueError, match="the sliced Wasserstein distance takes squares of 16×16 or more"):
        PatchSet().add(torch.rand(1, 3, *size))
