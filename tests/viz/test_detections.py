"""Pictures of detections."""

import itertools

import numpy as np
import pytest

from coconv_surgery.viz.detections import Boxes, plot_detections
from coconv_surgery.viz.placing import place_labels


def overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@pytest.mark.parametrize("seed", range(20))
def test_no_two_labels_overlap_or_leave_the_picture_while_there_is_room(seed):
    random = np.random.default_rng(seed)
    count = random.integers(1, 30)
    left_top = random.uniform(0, 150, (count, 2)) * (seed % 2)  # all in one corner, half of the time
    boxes = np.concatenate([left_top, left_top + random.uniform(5, 50, (count, 2))], axis=1)
    labels = place_labels(boxes, [(w, 8) for w in random.uniform(15, 45, count)], (200, 200))
    assert all(0 <= left < right <= 200 and 0 <= top < bottom <= 200 for left, top, right, bottom in labels)
    assert not any(overlap(one, other) for one, other in itertools.combinations(labels, 2))


def test_a_label_that_finds_no_room_is_drawn_all_the_same():
    assert place_labels([[0, 0, 10, 10]] * 3, [(10, 10)] * 3, (10, 10)) == [(0, 0, 10, 10)] * 3


@pytest.mark.parametrize("shape", [(100, 300), (300, 100), (64, 64)])
def test_the_labels_of_a_picture_do_not_overlap(shape, drawn, legible, tmp_path):
    height, width = shape
    boxes = [[0.3 * width, 0.3 * height, 0.7 * width, 0.7 * height]] * 5
    found = Boxes(boxes, range(5), [0.9, 0.8, 0.7, 0.6, 0.2])
    image = np.full((height, width, 3), 128, np.uint8)
    plot_detections(tmp_path / "d.png", [image] * 2, [Boxes(boxes[:1], [0])] * 2, [found] * 2, [*"abcde"], title="all")
    legible(drawn[0])
    assert {"a 0.90", "b 0.80", "c 0.70", "d 0.60"} <= {text.get_text() for text in drawn[0].axes[2].texts}
    assert len(drawn[0].axes[2].texts) == 4
