"""The schedule."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconv_surgery.generation.growth import Growth

RESOLUTIONS = st.sampled_from((4, 8, 16, 32, 128, 1024))


@st.composite
def schedules(draw):
    resolution, fade, stabilise = (
        draw(RESOLUTIONS),
        draw(st.just(0) | st.integers(12, 60)),
        draw(st.just(0) | st.integers(12, 60)),
    )
    start = draw(st.sampled_from([side for side in (4, 8, 16, 32) if side <= resolution]))
    least = (fade + stabilise) * (resolution.bit_length() - start.bit_length()) + 1
    sizes = st.sampled_from((1, 2, 3, 4, 8, 12))
    batches = {side: draw(sizes) for side in (4, 8, 16, 32, 64, 128, 256, 512, 1024)}
    images = least + draw(st.integers(12, 100))
    return Growth(resolution=resolution, images=images, stabilise=stabilise, fade=fade, batches=batches, start=start)


@given(schedules())
def test_steps_are_as_many_as_a_walk_takes(growth):
    walked = list(growth.walk())
    assert growth.steps() == len(walked)
    for index, (seen, _) in enumerate(walked):
        assert growth.steps(seen) == len(walked) - index


@given(schedules())
def test_a_walk_sees_all_images_and_less_than_a_batch_more(growth):
    *_, (seen, step) = growth.walk()
    assert seen < growth.images <= seen + step.batch


@given(schedules())
def test_resolutions_and_fades_never_fall_and_end_whole(growth):
    steps = [step for _, step in growth.walk()]
    assert all(a.resolution <= b.resolution for a, b in pairwise(steps))
    assert all(0 < step.fade <= 1 for step in steps)
    same = [(a, b) for a, b in pairwise(steps) if a.resolution == b.resolution]
    assert all(a.fade <= b.fade for a, b in same)
    assert (steps[-1].resolution, steps[-1].fade) == (growth.resolution, 1)


@given(schedules())
def test_every_batch_is_of_its_resolution(growth):
    assert all(step.batch == growth.batches[step.resolution] for _, step in growth.walk())


def test_the_papers_schedule_takes_12_million_images():
    growth = Growth(resolution=128)
    assert growth.images == 12_000_000
    ends = [(phase.resolution, phase.fades, phase.begin) for phase in growth.phases]
    assert ends[:4] == [(4, False, 0), (8, True, 600_000), (8, False, 1_200_000), (16, True, 1_800_000)]
    assert ends[-1] == (128, False, 6_000_000)
    assert growth.batches[128] == 16


def test_a_fade_in_grows_by_the_images_seen_when_its_steps_are_done():
    growth = Growth(resolution=8, images=100, stabilise=20, fade=40, batches={4: 4, 8: 8})
    assert [growth.at(seen).fade for seen in (16, 20, 28, 44, 52, 60)] == [1, 0.2, 0.4, 0.8, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 12}, "resolution=12 must be 4, 8, 16"),
        ({"resolution": 8, "start": 16}, "start=16 is larger than resolution=8"),
        ({"resolution": 8, "images": 1_200_000}, "images=1200000 end before 8×8 pixels are faded in, after 1200000"),
        (
            {"resolution": 8, "images": 300, "stabilise": 100, "fade": 20},
            "the 20 images of a phase at 8×8 pixels",
        ),
        ({"resolution": 8, "fade": -1}, "fade=-1 must be at least 0"),
        ({"resolution": 8, "batches": {8: 6}}, r"batches\[8\]=6 must be at most 4, or a multiple of 4"),
        ({"resolution": 8, "batches": {9: 8}}, "batches has no key '9'"),
        ({"resolution": 8, "batches": 8}, "batches must be a dict of batch sizes by resolution, not int"),
    ],
)
def test_a_schedule_that_cannot_be_is_named(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Growth(**arguments)
