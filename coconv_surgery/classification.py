"""Image classification through MMEngine: timm's networks and transforms on a folder of class folders.

In a config::

    custom_imports = dict(imports=['coconv_surgery.classification'], allow_failed_imports=False)

registers the model ``TIMMClassifier``, the data set ``TIMMImageFolder`` and the metric ``TopKAccuracy``, besides what
:mod:`coconv_surgery.mmengine` and :mod:`coconv_surgery.zoo` do. The engine is MMEngine's, and mmdet is not imported;
mmdet's ``tools/train.py`` and ``tools/test.py`` run such a config as they run any other. ``configs/imagenet/`` holds
those of the paper.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from coconv_surgery.mmengine import SurgeryOptions  # first: where mmengine is missing, it says what to install

# isort: split
import timm
import torch
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from timm.data import create_transform
from torchvision.datasets import ImageFolder

import coconv_surgery.zoo  # noqa: F401
from coconv_surgery.layers.arguments import choice, instance, mapping, whole_numbers


@MODELS.register_module()
class TIMMClassifier(BaseModel):  # type: ignore[misc]
    """A timm network, converted or not, that learns to classify.

    The network is ``timm_model`` and starts from timm's weights. The loss is cross entropy. Besides mmengine's
    checkpoints, those of the network alone load, such as torchvision's and the CoConv authors'.

    Args:
        model_name: Any timm architecture, ``coresnet50`` and its kin among them.
        surgery: What to convert; the keys of :class:`~coconv_surgery.mmengine.SurgeryOptions`. The input size
            defaults to the one that timm gives for the network.
        data_preprocessor: As in mmengine's BaseModel, which by default moves a batch to the model's device.
        **kwargs: Further arguments of :func:`timm.create_model`, such as ``num_classes``, ``pretrained`` or
            ``checkpoint_path``.

    Raises:
        ValueError: As :class:`~coconv_surgery.mmengine.SurgeryOptions` and :func:`~coconv_surgery.plan_conversion`.

    >>> model = TIMMClassifier("resnet18", surgery=dict(policy="stage"), num_classes=10)
    >>> model.timm_model.layer1[0].conv2.dilations
    (1, 2, 3, 4)
    >>> model(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        model_name: str,
        surgery: Mapping[str, Any] | None = None,
        data_preprocessor: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_preprocessor)
        options = None if surgery is None else SurgeryOptions.read(surgery)
        self.timm_model = timm.create_model(instance(model_name, "model_name", str, "a name of timm's"), **kwargs)
        if options is not None:
            options.convert(self.timm_model)

    def init_weights(self) -> None:
        """Keep timm's weights: mmengine would initialise the network again, pretrained or not."""

    # mmengine's loader calls this too; it would only warn that no name fits.
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        inner = f"{prefix}timm_model."
        if not any(name.startswith(inner) for name in state_dict):
            for name in [name for name in state_dict if name.startswith(prefix)]:
                state_dict[inner + name.removeprefix(prefix)] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, inputs: torch.Tensor, data_samples: torch.Tensor | None = None, mode: str = "tensor") -> Any:
        """Classify images.

        Args:
            inputs: Images ``(N, 3, H, W)``.
            data_samples: Class indices ``(N,)``, which mode ``"loss"`` needs.
            mode: As in mmengine's BaseModel: ``"loss"``, ``"predict"`` or ``"tensor"``.

        Returns:
            ``dict(loss=...)`` in mode ``"loss"``, else logits ``(N, classes)``.

        Raises:
            TypeError: If it is ``"loss"`` without ``data_samples``.
            ValueError: If the mode is unknown.
        """
        choice(mode, "mode", ("loss", "predict", "tensor"))
        logits = self.timm_model(inputs)
        if mode != "loss":
            return logits
        labels = instance(data_samples, "data_samples", torch.Tensor, "a tensor of class indices in mode 'loss'")
        return {"loss": F.cross_entropy(logits, labels)}


@DATASETS.register_module()
class TIMMImageFolder(ImageFolder):  # type: ignore[misc]
    """torchvision's folder of class folders, seen through timm's transforms.

    Args:
        root: The folder. Its sub-folders, sorted by name, are the classes 0, 1, and so on.
        transform: Arguments of :func:`timm.data.create_transform`.

    Attributes:
        metainfo (dict): The ``classes``, for mmdet's NumClassCheckHook and the checkpoints.

    Raises:
        FileNotFoundError: If the folder has no class folders, or one of them has no images.
    """

    def __init__(self, root: str, transform: Mapping[str, Any]) -> None:
        instance(root, "root", (str, os.PathLike), "the path of a folder")
        super().__init__(root, create_transform(**mapping(transform, "transform", "arguments of create_transform()")))
        self.metainfo = {"classes": tuple(self.classes)}


@METRICS.register_module()
class TopKAccuracy(BaseMetric):  # type: ignore[misc]
    """Top-1, top-5, ... accuracy in percent, for data of (image, label) and predictions that are logits.

    Each image counts once, however the data are shared among processes.

    Args:
        topk: How many of the most likely classes may hold the label.
        collect_device: As in mmengine's BaseMetric.
        prefix: As in mmengine's BaseMetric; ``"accuracy"`` by default.

    >>> metric = TopKAccuracy(topk=(1, 2))
    >>> logits = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4]])
    >>> metric.process((torch.zeros(2, 3, 8, 8), torch.tensor([1, 2])), logits)
    >>> metric.evaluate(size=2)
    {'accuracy/top1': 50.0, 'accuracy/top2': 100.0}
    """

    default_prefix = "accuracy"

    def __init__(self, topk: Sequence[int] = (1, 5), collect_device: str = "cpu", prefix: str | None = None) -> None:
        super().__init__(collect_device, prefix)
        self.topk = whole_numbers(topk, "topk", "must be numbers of at least 1")

    def process(self, data_batch: Sequence[torch.Tensor], data_samples: Sequence[torch.Tensor]) -> None:
        """Note for each image whether its class is the first, the second, ... by its logits.

        Args:
            data_batch: Images and labels ``(N,)``.
            data_samples: N logits ``(classes,)``.
        """
        logits = torch.stack(list(data_samples))
        named = logits.topk(min(max(self.topk), logits.shape[1])).indices
        self.results.extend((named == data_batch[1].to(named.device)[:, None]).tolist())

    def compute_metrics(self, results: list[list[bool]]) -> dict[str, float]:
        """Sum up.

        Args:
            results: What :meth:`process` noted, of all processes.

        Returns:
            Accuracy in percent by ``top1``, ``top5``, ...
        """
        hits = torch.tensor(results)
        return {f"top{k}": 100 * hits[:, :k].any(1).double().mean().item() for k in self.topk}
