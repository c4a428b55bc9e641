"""Many networks of timm: deployed with random norms, and traced as they are."""

import csv
import itertools
from pathlib import Path

import pytest
import timm
import torch
from randomising import randomise_norms
from torch.utils._pytree import tree_leaves

from coconv_surgery import CoConv2d, convert, deploy, get_deployment
from coconv_surgery.tracing.inputs import infer_inputs

pytestmark = pytest.mark.long
TABLE = Path(__file__).parents[2] / "docs" / "coverage" / "timm.csv"


def smallest(count):
    """The smallest networks of every family of which a conversion changes something.

    Not those for images of 1,024 pixels, whose attention takes 20 GB.
    """
    rows = [row for row in csv.DictReader(TABLE.open()) if row["status"] == "converted" and int(row["converted"])]
    rows = [row for row in rows if max(timm.get_pretrained_cfg(row["name"]).input_size) <= 384]
    rows.sort(key=lambda row: (row["family"], int(row["parameters_before"])))
    families = itertools.groupby(rows, key=lambda row: row["family"])
    return [row["name"] for _, group in families for row in itertools.islice(group, count)]


def test_there_are_enough_networks():
    assert len(smallest(1)) >= 60
    assert len(smallest(2)) >= 100


@pytest.fixture
def converted(request):
    network = timm.create_model(request.param).eval()
    randomise_norms(network)
    convert(network)
    return network, infer_inputs(network).args[0]


@pytest.mark.parametrize("converted", smallest(2), indirect=True)
def test_a_deployed_network_computes_what_the_network_computes(converted):
    network, image = converted
    deployed = deploy(network)
    assert get_deployment(deployed).difference <= 1e-5 or differs_as_by_rounding(network, deployed, image)
    assert not any(isinstance(module, CoConv2d) for module in deployed.modules())


def differs_as_by_rounding(network, deployed, image):
    """Whether it differs in single precision alone, because the network makes much of small differences."""
    with torch.no_grad():
        found, expected = (tree_leaves(each.double()(image.double())) for each in (deployed, network))
    return all((a - b).abs().max() <= 1e-4 * b.abs().max() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("converted", smallest(1), indirect=True)
def test_jit_trace_with_its_check_gives_equal_outputs(converted):
    network, image = converted
    traced = torch.jit.trace(network, image)
    with torch.no_grad():
        for found, expected in zip(tree_leaves(traced(image)), tree_leaves(network(image)), strict=True):
            # By the largest output: with random norms the outputs of some reach 10⁹, and cancel each other out.
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
