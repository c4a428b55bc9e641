"""What `coconv table` prints: counts of the networks themselves, next to the paper's figures."""

import importlib.util

import pytest
import torch
from launching import python

import coconv_surgery as cs
from coconv_surgery.paper import tables
from coconv_surgery.paper.counting import count
from coconv_surgery.paper.tables import TABLES, Row, Table, render
from coconv_surgery.zoo.progan import coprogan

COUNTED = (1, 2, 3, 4, 5, 7)


@pytest.fixture(scope="module")
def counted():
    """Each table as it is printed, and what is counted for it, in order."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for number in COUNTED:
            costs = []
            patch.setattr(tables, "count", lambda *network, into=costs: into.append(count(*network)) or into[-1])
            found[number] = render(number), costs
    return found


@pytest.fixture(scope="module")
def printed(counted):
    return {number: text for number, (text, _) in counted.items()}


@pytest.fixture(scope="module")
def costs(counted):
    """By table and network."""
    return {
        (number, row.network): cost
        for number, (_, costs) in counted.items()
        for row, cost in zip(TABLES[number].rows, costs, strict=False)  # behind them come networks of other sizes
    }


# What does not follow from the networks that the paper names; the printed notes say so.
OTHER_PARAMETERS = {(5, "pre-act. ResNet-50"), (5, "pre-act. ResNet-101")} | {
    (2, f"{name}, fmap_base 8192") for name in ("ProGAN", "CoProGAN")
}
ROWS = [(number, row) for number in COUNTED for row in TABLES[number].rows if row.parameters is not None]


@pytest.mark.parametrize(("number", "row"), ROWS, ids=lambda value: getattr(value, "network", value))
def test_parameters_round_to_the_papers(costs, number, row):
    same = f"{costs[number, row.network].parameters / 1e6:.2f}" == f"{row.parameters:.2f}"
    assert same == ((number, row.network) not in OTHER_PARAMETERS)


@pytest.mark.parametrize(("number", "row"), ROWS, ids=lambda value: getattr(value, "network", value))
def test_the_wide_count_of_resnets_and_the_wide_progan_rounds_to_the_papers(costs, number, row):
    if row.network.startswith(("ResNet", "CoResNet", "DRN", "stage", "top")) or row.network.endswith("16384"):
        assert f"{costs[number, row.network].wide / 1e9:.2f}" == f"{row.gflops:.2f}"
    elif row.network.startswith(("SE", "pre-act")):
        assert costs[number, row.network].wide / 1e9 == pytest.approx(row.gflops, abs=0.02)
    else:
        assert abs(costs[number, row.network].wide / 1e9 - row.gflops) > 1


def test_co_networks_cost_what_the_plain_ones_cost(costs):
    for base in (8192, 16384):
        assert costs[2, f"CoProGAN, fmap_base {base}"] == costs[2, f"ProGAN, fmap_base {base}"]
    for data in ("CIFAR-10", "CelebA"):
        assert costs[7, f"CoProGAN, {data}"] == costs[7, f"ProGAN, {data}"]
    assert costs[4, "CoResNet-50, stride 8"] == costs[4, "DRN-50, stride 8"]
    for depth in (50, 101, 152):
        assert costs[5, f"CoResNet-{depth}"] == costs[5, f"ResNet-{depth}"]


def test_coprogan_has_table_2s_levels_and_channels():
    with torch.device("meta"):
        plan = cs.get_plan(coprogan())
    found = {}
    for row in plan.rows:
        if row.signature.kernel_size == (3, 3):
            found.setdefault(row.output_sizes, set()).add((row.dilations, row.splits))
    assert found == {
        ((4, 4),): {((1,), (512,))},
        ((8, 8),): {((1, 2), (256, 256))},
        ((16, 16),): {((1, 2, 3), (172, 170, 170))},
        ((32, 32),): {((1, 2, 3, 4), (128,) * 4)},
        ((64, 64),): {((1, 2, 3, 4), (64,) * 4)},
        ((128, 128),): {((1, 2, 3, 4), (32,) * 4)},
    }


def test_table_2_has_equal_counts_for_every_size_from_4_to_1024(printed):
    lines = [line.split("  ") for line in printed[2].splitlines() if "×" in line.partition(", fmap_base")[0]]
    rows = [[cell.strip() for cell in line if cell] for line in lines if ", fmap_base" in line[0]]
    sizes = [f"{4 << k}×{4 << k}, fmap_base {base}" for base in (8192, 16384) for k in range(9)]
    assert [row[0] for row in rows] == sizes
    assert all(row[1:3] == row[3:5] for row in rows)
    assert rows[14][:3] == ["128×128, fmap_base 16384", "27,211,538", "54.715"]


@pytest.mark.parametrize("number", COUNTED)
def test_every_network_is_printed_between_its_title_and_the_notes(costs, printed, number):
    text = printed[number]
    for row in TABLES[number].rows:
        line = next(line for line in text.splitlines() if line.startswith(f"{row.network}  "))
        assert f"{costs[number, row.network].parameters:,}" in line
        for figure in (row.parameters, row.gflops, *row.results):
            assert ("–" if figure is None else figure if isinstance(figure, str) else f"{figure:.2f}") in line
    assert text.startswith(f"Table {number}: ")
    assert ("They are not reproduced here." in text) == bool(TABLES[number].results)
    assert all(note in text for note in TABLES[number].notes)


def test_table_1_shows_the_levels_map_by_map(printed):
    lines = [line.split("  ") for line in printed[1].splitlines()]
    assert [[cell for cell in line if cell] for line in lines[4:8]] == [
        ["56×56", "3", "16 at 1, 16 at 2, 16 at 3, 16 at 4"],
        ["28×28", "4", "64 at 1, 32 at 2, 32 at 3"],
        ["14×14", "6", "128 at 1, 128 at 2"],
        ["7×7", "3", "512 at 1"],
    ]


def test_table_6_counts_mmdetections_detectors():
    if importlib.util.find_spec("mmdet") is None:
        with pytest.raises(RuntimeError, match=r"Table 6 is of detectors, .* pip install"):
            render(6)
    else:
        text = render(6)
        assert text.count("22,894,902") == text.count("41,887,030") == 2
        assert text.count("20.151") == text.count("47.500") == 2


def test_table_6_says_what_is_missing_without_mmdet():
    done = python("from coconv_surgery.paper.tables import ssd; ssd('r50')", mmdet=None)
    assert "RuntimeError: Table 6 is of detectors, and" in done.stderr


def test_times_are_of_each_network_side_by_side(monkeypatch):
    class Product(torch.nn.Module):
        def __init__(self, size):
            super().__init__()
            self.size = size

        def forward(self, x):
            return torch.ones(self.size, self.size) @ torch.ones(self.size, self.size)

    rows = (Row("small", lambda: Product(8), 0.0, 0.0), Row("large", lambda: Product(800), 0.0, 0.0))
    monkeypatch.setitem(TABLES, 8, Table("products", rows))
    small, large = [line.split() for line in render(8, timed=True).splitlines() if line.startswith(("small", "large"))]
    assert small[-1] == "1.00"
    assert float(large[-2]) > float(small[-2])
    assert float(large[-1]) > 1
