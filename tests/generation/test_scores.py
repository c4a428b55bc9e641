"""Scores of generated images: multi-scale similarity, and those that Inception's features define."""

import numpy as np
import pytest
import scipy.signal
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from coconv_surgery.generation.images import GrowingImages
from coconv_surgery.generation.sampling import Grown
from coconv_surgery.generation.scores import ms_ssim, real_images, score
from coconv_surgery.zoo.progan import Generator


class Made(GrowingImages):
    """Real images that a generator has made."""

    def __init__(self, grown: Grown, count: int):
        super().__init__(grown.resolution)
        self.made = torch.cat(list(grown.images(count, seed=7)))

    def __len__(self):
        return len(self.made)

    def __getitem__(self, request):
        assert request[1] == self.resolution
        return self.made[request[0]]


def grown(resolution: int, channels: int = 4) -> Grown:
    generator = Generator((channels,) * (resolution.bit_length() - 2), 8).eval()
    return Grown(generator, resolution, 1.0, None)


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file of weights of chance for the network that the scores are defined by, in its published form."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
    torch.save(network.state_dict(), path)
    return path


def similarity_by_formula(one, other):
    """Wang et al.'s similarity of two images of one colour, over five scales, of whole windows only."""
    product = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        size = min(11, one.shape[0] - 1 + one.shape[0] % 2)
        line = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * (1.5 * size / 11) ** 2))
        window = np.outer(line, line) / line.sum() ** 2

        def mean(x, window=window):
            return scipy.signal.convolve2d(x, window, mode="valid")

        means = mean(one), mean(other)
        products = [(0, 0, one * one), (1, 1, other * other), (0, 1, one * other)]
        (own, others, both) = (mean(x) - means[a] * means[b] for a, b, x in products)
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        found = (2 * both + c2) / (own + others + c2)
        if scale == 4:
            found = found * (2 * means[0] * means[1] + c1) / (means[0] ** 2 + means[1] ** 2 + c1)
        product *= found.mean() ** weight
        one, other = (x.reshape(len(x) // 2, 2, -1, 2).mean((1, 3)) for x in (one, other))
    return product


@pytest.mark.parametrize("side", [128, 192])
def test_ms_ssim_is_that_of_its_formula(side):
    smooth = torch.nn.functional.interpolate(255 * torch.rand(2, 1, side // 8, side // 8), size=side, mode="bicubic")
    ones = smooth.clamp(0, 255)
    others = (ones + 20 * torch.randn_like(ones)).clamp(0, 255)
    pairs = zip(ones[:, 0].double().numpy(), others[:, 0].double().numpy(), strict=True)
    assert ms_ssim(ones, others).numpy() == pytest.approx([similarity_by_formula(a, b) for a, b in pairs], abs=1e-4)


def test_ms_ssim_of_128_pixels_is_one_for_equal_images_and_falls_with_noise():
    image = torch.nn.functional.interpolate(255 * torch.rand(1, 3, 16, 16), size=128, mode="bicubic").clamp(0, 255)
    noise = torch.randn_like(image)
    values = [ms_ssim(image, (image + scale * noise).clamp(0, 255)).item() for scale in (0, 20, 60)]
    assert values[0] == pytest.approx(1)
    assert values[0] > values[1] > values[2] > 0


def test_swd_of_a_generator_with_itself_is_less_than_with_another():
    one, other = grown(32), grown(32)
    reals = Made(one, 64)
    same, different = (score(each, reals, ["swd"], count=64) for each in (one, other))
    assert list(same) == ["SWD×10³ 32", "SWD×10³ 16", "SWD×10³ average"]
    assert same["SWD×10³ average"] == pytest.approx((same["SWD×10³ 32"] + same["SWD×10³ 16"]) / 2)
    assert same["SWD×10³ average"] < different["SWD×10³ average"]


def test_scores_repeat_exactly():
    one = grown(16)
    reals = Made(one, 20)
    assert score(one, reals, ["swd"]) == score(one, reals, ["swd"])


def test_inception_defines_fid_and_is(inception):
    one, other = grown(8), grown(8)
    reals = Made(one, 4)
    with torch.no_grad():
        other.generator.to_rgb[-1].bias += 3
    scores = score(one, reals, ["is", "fid"], count=4, inception=inception)
    assert list(scores) == ["IS", "IS ±", "FID"]
    assert scores["IS"] >= 1
    assert scores["FID"] < score(other, reals, ["fid"], count=4, inception=inception)["FID"]


def test_scores_come_in_the_order_of_table_7(inception):
    one = grown(128, channels=2)
    found = score(one, Made(one, 4), ["swd", "ms-ssim", "fid", "is"], count=4, inception=inception)
    levels = [f"SWD×10³ {level}" for level in (128, 64, 32, 16, "average")]
    assert list(found) == ["IS", "IS ±", "FID", "MS-SSIM", *levels]
    assert all(np.isfinite(value) for value in found.values())


def test_real_images_are_chosen_without_repetition():
    one = grown(8)
    data = Made(one, 70)
    batches = list(real_images(data, 8, 50, seed=1))
    assert [len(batch) for batch in batches] == [32, 18]
    assert len(torch.unique(torch.cat(batches), dim=0)) == len(torch.unique(data.made, dim=0)) - 20


@pytest.mark.parametrize(
    ("resolution", "scores", "message"),
    [
        (8, ["swd"], "images of 8×8 pixels are too small for SWD: it starts at 16"),
        (64, ["ms-ssim"], "images of 64×64 pixels are too small for MS-SSIM, which halves them four times: 128"),
        (16, ["fid"], "FID and IS need Inception's weights: get https://.*, and name the file"),
        (16, ["kid"], "scores='kid': choose 'swd', 'ms-ssim', 'fid' or 'is'"),
    ],
)
def test_a_score_that_cannot_be_is_named(resolution, scores, message):
    one = grown(resolution)
    with pytest.raises(ValueError, match=message):
        score(one, Made(one, 2), scores, count=2)


@pytest.mark.parametrize("count", [3, 6])
def test_a_count_that_is_odd_or_more_than_there_are_is_named(count):
    one = grown(16)
    with pytest.raises(ValueError, match=f"count={count} must be even, and at most the number of real images, 4"):
        score(one, Made(one, 4), ["swd"], count=count)


def test_mirrored_real_images_are_every_other_one():
    one = grown(8)
    data = Made(one, 6)
    (plain,), (mirrored,) = (list(real_images(data, 8, 6, mirror=each)) for each in (False, True))
    assert torch.equal(mirrored[::2], plain[::2].flip(3))
    assert torch.equal(mirrored[1::2], plain[1::2])


def test_a_file_without_inceptions_weights_is_named(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    one = grown(16)
    with pytest.raises(ValueError, match=r"other.pth does not hold Inception's weights: get https://"):
        score(one, Made(one, 2), ["is"], count=2, inception=tmp_path / "other.pth")


def test_weights_of_inception_that_are_not_there_are_named():
    one = grown(16)
    with pytest.raises(FileNotFoundError, match=r"inception='none.pth': there is no such file: get https://"):
        score(one, Made(one, 2), ["is"], count=2, inception="none.pth")


def test_images_that_are_larger_than_the_real_ones_are_named():
    with pytest.raises(ValueError, match="the generator makes images of 32×32 pixels, larger than the real ones"):
        score(grown(32), Made(grown(16), 2), ["swd"])
