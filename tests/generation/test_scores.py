"""Scores of generated images: multi-scale similarity, and those that Inception's features define."""

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

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


def test_ms_ssim_is_torchmetrics_own_where_its_windows_fit():
    ones = 255 * torch.rand(3, 3, 192, 192)
    others = (0.7 * ones + 0.3 * 255 * torch.rand(3, 3, 192, 192)).clamp(0, 255)
    expected = [
        multiscale_structural_similarity_index_measure(a[None], b[None], data_range=255.0)
        for a, b in zip(ones, others, strict=True)
    ]
    torch.testing.assert_close(ms_ssim(ones, others), torch.stack(expected), rtol=1e-4, atol=1e-5)


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
    reals = Made(one, 12)
    with torch.no_grad():
        other.generator.to_rgb[-1].bias += 3
    scores = score(one, reals, ["is", "fid"], count=12, inception=inception)
    assert list(scores) == ["IS", "IS ±", "FID"]
    assert scores["IS"] >= 1
    assert scores["FID"] < score(other, reals, ["fid"], count=12, inception=inception)["FID"]


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
    ],
)
def test_a_score_that_cannot_be_is_named(resolution, scores, message):
    one = grown(resolution)
    with pytest.raises(ValueError, match=message):
        score(one, Made(one, 2), scores, count=2)


def test_weights_of_inception_that_are_not_there_are_named():
    one = grown(16)
    with pytest.raises(FileNotFoundError, match=r"inception='none.pth': there is no such file: get https://"):
        score(one, Made(one, 2), ["is"], count=2, inception="none.pth")


def test_images_that_are_larger_than_the_real_ones_are_named():
    with pytest.raises(ValueError, match="the generator makes images of 32×32 pixels, larger than the real ones"):
        score(grown(32), Made(grown(16), 2), ["swd"])
