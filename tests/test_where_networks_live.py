"""A plan kept where networks are kept: plain weights come back first, and the plan is applied after them."""

import json
import warnings

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin

import coconv_surgery as cs
from conftest import TinyNet


@pytest.fixture(autouse=True)
def _no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# -- huggingface_hub ----------------------------------------------------------------------------------------------


class HubNet(TinyNet, PyTorchModelHubMixin):
    """A network of one's own that remembers how it was converted."""

    def __init__(self, plan: str | None = None) -> None:
        super().__init__()
        self.plan = plan

    def save_pretrained(self, *args, **kwargs):
        return super().save_pretrained(*args, config={"plan": cs.get_plan(self).to_json()}, **kwargs)

    @classmethod
    def _from_pretrained(cls, **kwargs):
        net = super()._from_pretrained(**kwargs)
        return net if net.plan is None else cs.apply_plan(net, cs.Plan.from_json(net.plan))


def test_a_network_with_the_hub_mixin_comes_back_converted(image, tmp_path):
    net = cs.convert(HubNet().eval(), input_size=32)
    net.save_pretrained(tmp_path)
    assert cs.Plan.from_json(json.loads((tmp_path / "config.json").read_text())["plan"]) == cs.get_plan(net)
    again = HubNet.from_pretrained(tmp_path).eval()
    assert torch.equal(again(image), net(image))
    assert cs.get_plan(again) == cs.get_plan(net)


# -- transformers -------------------------------------------------------------------------------------------------


def test_a_network_of_transformers_keeps_its_plan_in_its_config(image, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    net = transformers.ResNetForImageClassification(config).eval()
    cs.convert(net, cs.UniformPolicy(2), input_size=32)
    net.config.coconv_plan = cs.get_plan(net).to_json()
    net.save_pretrained(tmp_path)

    again = transformers.ResNetForImageClassification.from_pretrained(tmp_path).eval()
    cs.apply_plan(again, cs.Plan.from_json(again.config.coconv_plan))
    assert cs.get_plan(again).converted
    assert torch.equal(again(image).logits, net(image).logits)


# -- Lightning ----------------------------------------------------------------------------------------------------


def test_a_lightning_module_takes_its_plan_as_a_hyperparameter(image, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self, plan: str | None = None) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = TinyNet()
            if plan is not None:
                cs.apply_plan(self.net, cs.Plan.from_json(plan))

        def training_step(self, batch, index):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    plan = cs.plan_conversion(TinyNet(), input_size=32)
    model = Classifier(plan.to_json())
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", max_steps=1, enable_checkpointing=False, **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, torch.utils.data.DataLoader(torch.randn(2, 3, 32, 32), batch_size=2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    again = Classifier.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    assert cs.get_plan(again.net) == plan
    assert torch.equal(again.net(image), model.eval().net(image))
