"""The configs of SSD300 on ResNet and CoResNet."""

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData
from sampling import few

from coconv_surgery import CoConv2d
from coconv_surgery.mmdet.flops import count_complexity

PARAMETERS = {"r50": 22_894_902, "coresnet50": 22_894_902, "r101": 41_887_030, "coresnet101": 41_887_030}


def read(configs, name: str) -> Config:
    config = Config.fromfile(configs / "ssd" / f"ssd300_{name}_coco.py")
    config.model.backbone.init_cfg = None
    return config


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_parameters_are_table_6s(name, configs):
    detector = MODELS.build(read(configs, name).model)
    assert sum(parameter.numel() for parameter in detector.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("depth", few([50, 101], 1))
def test_resnet_and_coresnet_have_equal_flops(depth, configs):
    plain, contextual = (
        count_complexity(MODELS.build(read(configs, f"{kind}{depth}").model), (300, 300)) for kind in ("r", "coresnet")
    )
    assert plain == contextual
    assert plain.parameters == PARAMETERS[f"r{depth}"]


def test_the_head_sees_maps_of_38_to_1(configs):
    detector = MODELS.build(read(configs, "coresnet50").model).eval()
    maps = detector.extract_feat(torch.zeros(1, 3, 300, 300))
    assert [tuple(feature.shape[1:]) for feature in maps] == [
        (1024, 38, 38),
        (512, 19, 19),
        (512, 10, 10),
        (256, 5, 5),
        (256, 3, 3),
        (256, 1, 1),
    ]
    assert sum(isinstance(module, CoConv2d) for module in detector.modules()) == 13


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_schedule_is_the_papers(name, configs):
    config = read(configs, name)
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("SGD", 0.02, 0.9, 5e-4)
    assert config.train_cfg.max_epochs == 130
    assert config.train_dataloader.batch_size == 32
    assert config.train_dataloader.dataset.times == 1
    warm_up, steps = config.param_scheduler
    assert (warm_up.type, warm_up.end, warm_up.convert_to_iter_based) == ("LinearLR", 1, True)
    assert (steps.type, list(steps.milestones), steps.gamma) == ("MultiStepLR", [86, 108], 0.1)


@pytest.fixture
def batch() -> dict:
    """Two images with a box each."""
    sample = DetDataSample(metainfo={"img_id": 0, "img_shape": (192, 192), "ori_shape": (192, 192)})
    boxes, labels = torch.tensor([[30.0, 40.0, 70.0, 90.0]]), torch.tensor([1])
    sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
    images = torch.randint(0, 256, (2, 3, 192, 192), dtype=torch.uint8)
    return {"inputs": list(images), "data_samples": [sample, sample.clone()]}


@pytest.mark.parametrize("setting", ["plain", "bf16", "with_cp"])
def test_a_training_step_runs_and_moves_the_contextual_convs(setting, tiny_ssd, batch):
    # Zero-initialised residual branches would not move in the first step.
    tiny_ssd.model.backbone.update(with_cp=setting == "with_cp", zero_init_residual=False)
    detector = MODELS.build(tiny_ssd.model)
    detector.init_weights()
    detector.train()
    convs = [module for module in detector.modules() if isinstance(module, CoConv2d)]
    before = [conv.weight.detach().clone() for conv in convs]
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.01)
    with torch.autocast("cpu", torch.bfloat16, enabled=setting == "bf16"):
        losses = detector(**detector.data_preprocessor(batch, True), mode="loss")
        loss, _ = detector.parse_losses(losses)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert len(convs) == 12
    assert not any(torch.equal(conv.weight, weight) for conv, weight in zip(convs, before, strict=True))
