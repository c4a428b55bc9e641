"""Real networks that keep grids by size, or switch gradients off."""

import copy

import pytest
import timm
import torch
from sampling import few

import coconv_surgery as cs


def test_a_detector_that_keeps_its_anchors_by_size_runs_as_before():
    transformers = pytest.importorskip("transformers")
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64, 64, 128], depths=[1] * 4, out_features=["stage2", "stage3", "stage4"]
    )
    network = transformers.RTDetrForObjectDetection(
        transformers.RTDetrConfig(
            backbone_config=backbone,
            encoder_in_channels=[64, 64, 128],
            encoder_hidden_dim=32,
            d_model=32,
            decoder_in_channels=[32] * 3,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            num_queries=20,
        )
    ).eval()
    plain, image = copy.deepcopy(network), torch.rand(1, 3, 128, 128)
    plan = cs.plan_conversion(network, input_size=128)
    with torch.no_grad():
        expected = plain(image)
        for field in ("logits", "pred_boxes"):
            assert type(network(image)[field]) is torch.Tensor
            assert torch.equal(network(image)[field], expected[field])
        cs.convert(network, input_size=128)
        assert len(cs.get_plan(network).converted) == len(plan.converted) > 10
        assert network(image).logits.shape == expected.logits.shape
        cs.revert(network)
        assert torch.equal(network(image).logits, expected.logits)


@pytest.mark.parametrize(
    "name",
    few(
        [
            "resnet18",
            "efficientnet_b0",
            "regnety_004",
            "densenet121",
            "resnetv2_50",
            "mobilenetv3_large_100",
            "vovnet39a",
        ],
        3,
    ),
)
def test_checkpointing_makes_no_difference_to_timms_networks(name):
    model = timm.create_model(name)
    plan = cs.plan_conversion(model, input_size=64)
    model.set_grad_checkpointing(True)
    checkpointed = cs.plan_conversion(model, input_size=64)
    assert checkpointed.diff(plan) == []
    assert [row.reason for row in checkpointed.rows] == [row.reason for row in plan.rows]
