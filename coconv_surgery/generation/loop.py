"""How MMEngine trains a GAN: a loop that gives each step its images, two optimizers, and pictures on the way."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from mmengine.dist import get_dist_info, master_only
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from mmengine.registry import DATASETS, HOOKS, LOOPS, OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.runner import BaseLoop
from torch.utils.data import DataLoader

from coconv_surgery.generation.images import CIFAR10Images, FolderImages, GrowingBatches, GrowingImages, seeded
from coconv_surgery.generation.model import ProGAN
from coconv_surgery.generation.sampling import as_bytes, grid
from coconv_surgery.layers.arguments import instance, mapping, whole_number
from coconv_surgery.mmengine.hooks import converted_network

DATASETS.register_module(module=FolderImages)
DATASETS.register_module(module=CIFAR10Images)


@LOOPS.register_module()
class GrowingTrainLoop(BaseLoop):  # type: ignore[misc]
    """Trains a :class:`~coconv_surgery.generation.model.ProGAN` until it has seen all images of its schedule.

    It goes on from where the model's weights have been trained to, whether all of a run is resumed or weights alone are
    loaded, and with a schedule that differs in what lies ahead.

    Args:
        runner: MMEngine's runner.
        dataloader: The ``dataset``, a :class:`~coconv_surgery.generation.images.GrowingImages` or its config, and
            further arguments of torch's data loader, such as ``num_workers``. Batches follow from the schedule.

    Raises:
        TypeError: If the model or the data set are of another kind.
        ValueError: If the data set is of another resolution, batches cannot be shared among the processes, the schedule
            is another one than the weights were trained by, or weights alone are loaded and nothing remains.
    """

    def __init__(self, runner: Any, dataloader: Any) -> None:
        settings = mapping(dataloader, "train_dataloader", "a dataset and arguments of a data loader")
        dataset = settings.pop("dataset", None)
        if isinstance(dataset, Mapping):
            dataset = DATASETS.build(dict(dataset))
        self.dataset = instance(dataset, "dataset", GrowingImages, "one that gives an image at every resolution")
        self.model = instance(converted_network(runner), "model", ProGAN, "a ProGAN")
        growth = self.model.growth
        if (dataset.resolution, dataset.colours) != (growth.resolution, self.model.colours):
            raise ValueError(
                f"the data set has resolution={dataset.resolution} and colours={dataset.colours}, the model "
                f"resolution={growth.resolution} and colours={self.model.colours}: give both the same"
            )
        rank, world = get_dist_info()
        self.batches = GrowingBatches(growth, len(dataset), self.model.seed, rank, world)
        self.max_iters = len(self.batches)  # of what is loaded after this, nothing is known yet
        super().__init__(runner, DataLoader(dataset, batch_sampler=self.batches, **settings))
        self._iter = 0  # which the runner sets when it resumes
        self.max_epochs, self._epoch, self.epoch = 1, 0, 0

    @property
    def iter(self) -> int:
        """Steps done."""
        return self._iter

    def run(self) -> nn.Module:
        """Train, from where the model has been trained to."""
        self.batches.seen = self._seen()
        self.max_iters = self._iter + len(self.batches)
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        for images in self.dataloader:
            self.runner.model.train()
            arguments = {"batch_idx": self._iter, "data_batch": images}
            self.runner.call_hook("before_train_iter", **arguments)
            outputs = self.runner.model.train_step(images, optim_wrapper=self.runner.optim_wrapper)
            self.runner.call_hook("after_train_iter", **arguments, outputs=outputs)
            self._iter += 1
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        model: nn.Module = self.runner.model
        return model

    def _seen(self) -> int:
        """Real images that the model has seen, by this schedule."""
        seen, last, growth = self.model.images_seen, self.model.trained, self.model.growth
        if last.phase < 0:
            return 0
        now = growth.at(seen - last.batch)
        if (now.phase, now.resolution) != (last.phase, last.resolution):
            raise ValueError(
                f"the checkpoint has seen {seen:,} images, and stands in phase {last.phase} at {last.resolution}×"
                f"{last.resolution} pixels, where this schedule is in phase {now.phase} at {now.resolution}×"
                f"{now.resolution}: give the growth= that it was trained with, up to there"
            )
        if seen >= growth.images and self._iter == 0:
            raise ValueError(
                f"the checkpoint has seen {seen:,} images, and the schedule has {growth.images:,}: nothing remains. "
                "Give growth=dict(images=...) more, or begin without the checkpoint"
            )
        return seen


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class EachNetworkConstructor:
    """Builds an optimizer for each of several networks in a model.

    Args:
        optim_wrapper_cfg: Config of an optimizer wrapper by name of the network, such as
            ``dict(generator=dict(type="OptimWrapper", optimizer=dict(type="Adam", lr=1e-3)))``.
        paramwise_cfg: Not used: each config has its own.
    """

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Any = None) -> None:
        self.configs = mapping(optim_wrapper_cfg, "optim_wrapper", "optimizer wrappers by network")

    def __call__(self, model: nn.Module) -> OptimWrapperDict:
        """Build them.

        Args:
            model: The model, wrapped or not.

        Raises:
            ValueError: If it has no network of such a name.
        """
        whole = getattr(model, "module", model)
        for name in self.configs:
            if name not in dict(whole.named_children()):
                raise ValueError(f"optim_wrapper: {type(whole).__name__} has no network {name!r}")
        return OptimWrapperDict(
            **{name: build_optim_wrapper(getattr(whole, name), dict(config)) for name, config in self.configs.items()}
        )


@HOOKS.register_module()
class FiniteWeightsHook(Hook):  # type: ignore[misc]
    """Ends a training whose weights are not finite any more, before they are saved.

    Args:
        interval: Steps from one look to the next; a GPU waits for each.
    """

    def __init__(self, interval: int = 100) -> None:
        self.interval = whole_number(interval, "interval", at_least=1)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Look at the weights, where it is due.

        Raises:
            FloatingPointError: If one is not finite.
        """
        if (batch_idx + 1) % self.interval == 0:
            _check_finite(converted_network(runner), runner.iter)

    def after_train(self, runner: Any) -> None:
        """Look at the weights.

        Raises:
            FloatingPointError: If one is not finite.
        """
        _check_finite(converted_network(runner), runner.iter)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Look at the weights.

        Raises:
            FloatingPointError: If one is not finite.
        """
        _check_finite(converted_network(runner), runner.iter)


def _check_finite(model: nn.Module, step: int) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(f"{name} is not finite at step {step}: the training has failed")


@HOOKS.register_module()
class SampleGridHook(Hook):  # type: ignore[misc]
    """Pictures what the averaged generator makes of the same latents, at the end of every phase and on the way.

    They go to the runner's visualizer: with its local and TensorBoard backends, to files and to TensorBoard.

    Args:
        interval: Steps from one picture to the next; 0 for those of phases alone.
        images: How many images a picture has.
        seed: Of the latents.
    """

    def __init__(self, interval: int = 0, images: int = 64, seed: int = 0) -> None:
        self.interval = whole_number(interval, "interval", at_least=0)
        self.images, self.seed = whole_number(images, "images", at_least=1), whole_number(seed, "seed", at_least=0)

    @master_only  # type: ignore[untyped-decorator]
    def before_train(self, runner: Any) -> None:
        """Picture real images."""
        data, side = runner.train_loop.dataset, runner.train_loop.dataset.resolution
        chosen = torch.randperm(len(data), generator=seeded(self.seed))[: self.images].tolist()
        reals = torch.stack([data[index, side] for index in chosen])
        runner.visualizer.add_image("reals", grid(reals), step=0)

    @master_only  # type: ignore[untyped-decorator]
    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Picture generated images, where one is due."""
        model = converted_network(runner)
        assert isinstance(model, ProGAN)
        seen, trained = model.images_seen, model.trained
        ends = seen >= model.growth.images or model.growth.at(seen).phase != trained.phase
        if ends or (self.interval and (batch_idx + 1) % self.interval == 0):
            latents = torch.randn(self.images, model.latent, generator=seeded(self.seed))
            with torch.no_grad():
                fakes = as_bytes(model(latents.to(model.progress.device)))
            runner.visualizer.add_image(f"samples-{trained.resolution}x{trained.resolution}", grid(fakes), step=seen)
