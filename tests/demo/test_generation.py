"""Both networks on drawn images, as `coconv demo --generation` trains them."""

import re

import numpy as np
import pytest
from PIL import Image

from coconv_surgery.demo.generation import train_and_generate


@pytest.mark.long
def test_distances_to_held_out_images_fall_by_half_and_more(tmp_path):
    told = []
    report = train_and_generate(tmp_path, lambda done, what: told.append((done, what)))
    found = re.findall(r"(\w+): SWD×10³ ([\d.]+) untrained, ([\d.]+) after 48,000 images", report)
    assert [name for name, _, _ in found] == ["ProGAN", "CoProGAN"]
    assert all(float(after) <= float(before) / 2 for _, before, after in found)
    shares = [done for done, _ in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    picture = np.asarray(Image.open(tmp_path / "generation.png"))
    assert picture.shape[1] > 2 * picture.shape[0]
    again = train_and_generate(tmp_path, lambda done, what: None)
    assert again == report
