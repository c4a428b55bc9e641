"""The model, the data set and the metric."""

import pytest
import timm
import torch
import torch.nn.functional as F
from launching import python
from mmengine.runner import Runner, load_checkpoint
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, Normalize, RandomHorizontalFlip, Resize, ToTensor

from coconv_surgery import CoConv2d, plan_conversion
from coconv_surgery.classification import TIMMClassifier, TIMMImageFolder, TopKAccuracy
from coconv_surgery.zoo import export_authors_state_dict

NARROW = {"channels": (8, 16, 32, 64), "num_classes": 10}


def test_the_loss_is_cross_entropy_and_the_prediction_logits():
    model = TIMMClassifier("coresnet26", **NARROW).eval()
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 3, 9, 3])
    logits = model(images)
    assert torch.equal(model(images, labels, mode="predict"), logits)
    assert torch.equal(model(images, labels, mode="loss")["loss"], F.cross_entropy(logits, labels))


def test_an_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="mode='train': choose 'loss', 'predict' or 'tensor'"):
        TIMMClassifier("coresnet26", **NARROW)(torch.zeros(1, 3, 32, 32), mode="train")


def test_weights_from_a_file_survive_mmengines_initialisation(tmp_path):
    source = TIMMClassifier("coresnet26", **NARROW).timm_model.state_dict()
    torch.save(source, tmp_path / "weights.pth")
    model = TIMMClassifier("coresnet26", checkpoint_path=str(tmp_path / "weights.pth"), **NARROW)
    model.init_weights()
    assert all(torch.equal(value, source[name]) for name, value in model.timm_model.state_dict().items())


@pytest.mark.parametrize("network", ["resnet26", "coresnet26", "coresnet50.iduta"])
def test_a_checkpoint_of_the_network_alone_loads_through_mmengine(network, tmp_path):
    source = timm.create_model(network, **NARROW).eval()
    state = export_authors_state_dict(source) if network.endswith("iduta") else source.state_dict()
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "network.pth")
    model = TIMMClassifier(network, **NARROW).eval()
    load_checkpoint(model, str(tmp_path / "network.pth"), strict=True)
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(image), source(image))


def test_surgery_converts_any_timm_network_by_policy_or_saved_plan(tmp_path):
    chosen = TIMMClassifier("resnet18", surgery={"policy": {"type": "uniform", "count": 2}, "include": ["layer1.*"]})
    convs = {name for name, module in chosen.timm_model.named_modules() if isinstance(module, CoConv2d)}
    assert convs == {f"layer1.{block}.conv{conv}" for block in (0, 1) for conv in (1, 2)}

    plan_conversion(TIMMClassifier("resnet18").timm_model).to_json(tmp_path / "plan.json")
    planned = TIMMClassifier("resnet18", surgery={"plan": str(tmp_path / "plan.json")})
    assert planned.timm_model.layer1[0].conv1.dilations == (1, 2, 3, 4)


def test_a_training_step_in_bfloat16_moves_the_contextual_convs():
    model = TIMMClassifier("coresnet26", zero_init_last=False, **NARROW)
    convs = [module for module in model.modules() if isinstance(module, CoConv2d)]
    before = [conv.weight.detach().clone() for conv in convs]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(8, 3, 64, 64), torch.arange(8), mode="loss")["loss"]
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert len(convs) == 6
    assert not any(torch.equal(conv.weight, weight) for conv, weight in zip(convs, before, strict=True))


def test_images_are_tested_as_torchvision_would(images, coresnet50, tmp_path):
    normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    usual = ImageFolder(images / "val", Compose([Resize(256), CenterCrop(224), ToTensor(), normalize]))
    tested = TIMMImageFolder(images / "val", coresnet50.test_dataloader.dataset.transform)
    assert tested.metainfo["classes"] == tuple(usual.classes)
    assert len(tested) == len(usual) == 7
    for (image, label), (expected, usual_label) in zip(tested, usual, strict=True):
        torch.testing.assert_close(image, expected)
        assert label == usual_label


def test_images_to_train_on_are_cropped_and_flipped_and_nothing_else(images, coresnet50):
    steps = TIMMImageFolder(images / "train", coresnet50.train_dataloader.dataset.transform).transform.transforms
    crop, flip, *rest = steps
    assert type(crop).__name__ == "RandomResizedCropAndInterpolation"
    assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert isinstance(flip, RandomHorizontalFlip)
    assert [type(step).__name__ for step in rest] == ["MaybeToTensor", "Normalize"]
    image = Image.new("RGB", (300, 200), (255, 0, 0))
    colours = torch.stack([rest[1](rest[0](crop(image))) for _ in range(4)])
    assert torch.equal(colours, colours[:1, :, :1, :1].expand_as(colours))


@pytest.mark.parametrize("classes", [3, 5, 20])
def test_top_k_accuracy_is_the_share_of_classes_among_the_k_first(classes):
    logits, labels = torch.randn(40, classes), torch.randint(classes, (40,))
    metric = TopKAccuracy(topk=(1, 2, 5))
    for part in (slice(0, 24), slice(24, 40)):
        metric.process([torch.zeros(1), labels[part]], list(logits[part]))
    places = [
        sorted(range(classes), key=lambda c: -row[c]).index(label)
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    expected = {f"accuracy/top{k}": 100 * sum(place < k for place in places) / 40 for k in (1, 2, 5)}
    assert metric.evaluate(size=40) == pytest.approx(expected)


def test_an_image_that_fills_up_the_last_batch_does_not_count():
    metric = TopKAccuracy(topk=(1,))
    metric.process([torch.zeros(1), torch.tensor([0, 1, 1])], list(torch.eye(2)[[0, 1, 0]]))
    assert metric.evaluate(size=2) == {"accuracy/top1": 100.0}


def test_a_wrong_number_of_classes_is_named_before_training(coresnet50, small, tmp_path):
    coresnet50.merge_from_dict({**small, "model.num_classes": 5, "work_dir": str(tmp_path)})
    coresnet50.experiment_name = tmp_path.name  # mmengine shares a logger among equal names
    with pytest.raises(AssertionError, match=r"(?s)`num_classes` \(5\).*does not matches.*6.*TIMMImageFolder"):
        Runner.from_cfg(coresnet50).train()


def test_the_import_says_what_to_install_without_mmengine():
    process = python("import coconv_surgery.classification", mmengine=None)
    assert "needs mmengine: pip install 'coconv-surgery[mmdet]'" in process.stderr


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TIMMClassifier(5), "model_name must be a name of timm's, not int"),
        (lambda: TIMMClassifier("test_resnet", surgery=[]), "surgery must be a dict of options, not list"),
        (
            lambda: TIMMClassifier("test_resnet")(torch.zeros(2, 3, 64, 64), mode="loss"),
            "data_samples must be a tensor",
        ),
        (lambda: TIMMImageFolder(None, {}), "root must be the path of a folder, not NoneType"),
        (lambda: TIMMImageFolder("x", [1]), "transform must be a dict of arguments of create_transform.., not list"),
        (lambda: TopKAccuracy(5), "topk=5 must be numbers of at least 1"),
        (lambda: TopKAccuracy((1, 0)), r"topk=\(1, 0\) must be numbers of at least 1"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
