"""The configs of ResNet and CoResNet on ImageNet."""

import pytest
import torch
import yaml
from mmdet.registry import MODELS
from mmengine.config import Config

PARAMETERS = {50: 25_557_032, 101: 44_549_160, 152: 60_192_808}
PLAIN = [(1,)] * 4
TABLE_1 = [(1, 2, 3, 4), (1, 2, 3), (1, 2), (1,)]
# Depth, and the dilations of the 3×3 convolutions in each stage.
CONFIGS = {
    "resnet50_8xb32_in1k": (50, PLAIN),
    "resnet101_8xb32_in1k": (101, PLAIN),
    "resnet152_8xb32_in1k": (152, PLAIN),
    "coresnet50_8xb32_in1k": (50, TABLE_1),
    "coresnet101_8xb32_in1k": (101, TABLE_1),
    "coresnet152_8xb32_in1k": (152, TABLE_1),
    "coresnet50-levels1111_8xb32_in1k": (50, PLAIN),
    "coresnet50-levels2221_8xb32_in1k": (50, [(1, 2), (1, 2), (1, 2), (1,)]),
    "coresnet50-levels3321_8xb32_in1k": (50, [(1, 2, 3), (1, 2, 3), (1, 2), (1,)]),
    "coresnet50-levels3333_8xb32_in1k": (50, [(1, 2, 3)] * 4),
    "coresnet50-top4321_8xb32_in1k": (50, [(4,), (3,), (2,), (1,)]),
    "coresnet50-levels5432_8xb32_in1k-448px": (50, [(1, 2, 3, 4, 5), (1, 2, 3, 4), (1, 2, 3), (1, 2)]),
}


def build(configs, name: str) -> torch.nn.Module:
    return MODELS.build(Config.fromfile(configs / f"{name}.py").model)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_network_has_the_papers_parameters_and_levels(name, configs):
    depth, dilations = CONFIGS[name]
    model = build(configs, name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[depth]
    for stage, expected in enumerate(dilations, start=1):
        for block in getattr(model.timm_model, f"layer{stage}"):
            conv = block.conv2
            assert getattr(conv, "dilations", conv.dilation[:1]) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_the_schedule_is_the_papers(name, configs):
    config = Config.fromfile(configs / f"{name}.py")
    assert config.optim_wrapper.optimizer == {"type": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    assert config.train_cfg.max_epochs == 90
    assert (config.param_scheduler.milestones, config.param_scheduler.gamma) == ([30, 60, 80], 0.1)
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 256
    size = 448 if name.endswith("448px") else 224
    for split in ("train", "val", "test"):
        assert config[f"{split}_dataloader"].dataset.transform.input_size == size


def test_one_level_in_every_stage_is_resnet_to_the_last_bit(configs):
    plain, levels1111 = (build(configs, f"{name}_8xb32_in1k").eval() for name in ("resnet50", "coresnet50-levels1111"))
    levels1111.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 224, 224)
    assert torch.equal(plain(image), levels1111(image))


def test_the_metafile_has_every_config_with_its_parameters(configs):
    found = yaml.safe_load((configs / "metafile.yml").read_text())["Models"]
    assert {model["Name"]: model["Metadata"]["Parameters"] for model in found} == {
        name: PARAMETERS[depth] for name, (depth, _) in CONFIGS.items()
    }
    assert {path.name for path in configs.glob("*.py")} == {f"{name}.py" for name in CONFIGS}
    assert all(model["Config"] == f"configs/imagenet/{model['Name']}.py" for model in found)
