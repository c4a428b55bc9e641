"""ProGAN and CoProGAN as a model of MMEngine, which trains its two networks in turn."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.dist import get_dist_info
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import get_state_dict

from coconv_surgery.generation.growth import Growth, Step
from coconv_surgery.generation.images import seeded
from coconv_surgery.generation.losses import discriminator_losses, generator_loss
from coconv_surgery.generation.sampling import part_of_plan
from coconv_surgery.layers.arguments import flag, kind, mapping, whole_number
from coconv_surgery.mmengine import SurgeryOptions
from coconv_surgery.zoo.progan import discriminator, progan


@MODELS.register_module()
class ProGAN(BaseModel):  # type: ignore[misc]
    """A progressive GAN that learns from a folder of images.

    A step trains the discriminator once and the generator once (Karras et al., 2018), each from latents of its own.
    All that chance decides in a step depends on ``seed`` and on the images seen before, so that a run that was stopped
    goes on as if it had not been, with any number of processes. A phase begins with a fresh state of both optimizers.

    ``average`` is the exponential average of the generator, which generates in evaluation.

    Args:
        resolution: Side of the images in the end.
        fmap_base: As of :func:`~coconv_surgery.zoo.progan.widths`.
        fmap_max: As of :func:`~coconv_surgery.zoo.progan.widths`.
        latent: As of :func:`~coconv_surgery.zoo.progan.progan`.
        colours: Channels of the images.
        surgery: What to convert in the generator; the keys of :class:`~coconv_surgery.mmengine.SurgeryOptions`, but
            ``calibrate``. CoProGAN is ``dict(policy=dict(type="resolution", split="even"))``.
        discriminator_surgery: The same for the discriminator, which the paper leaves plain.
        growth: The schedule: the keys of :class:`~coconv_surgery.generation.growth.Growth`, but ``resolution``.
        penalty: As of :func:`~coconv_surgery.generation.losses.discriminator_losses`.
        target: As of :func:`~coconv_surgery.generation.losses.discriminator_losses`.
        drift: As of :func:`~coconv_surgery.generation.losses.discriminator_losses`.
        mirror: Whether half of the real images are mirrored.
        smoothing: Share of itself that the average keeps in a step.
        seed: Of latents, mirroring and mixing.
        data_preprocessor: As in mmengine's BaseModel, which by default moves a batch to the model's device.

    Raises:
        TypeError: If an argument is of a wrong kind.
        ValueError: If an argument is not a number that it can be, or as
            :class:`~coconv_surgery.mmengine.SurgeryOptions`.

    >>> model = ProGAN(8, fmap_base=64, surgery=dict(policy=dict(type="resolution", split="even")))
    >>> model.generator.blocks[1].conv0.dilations
    (1, 2)
    >>> model(torch.zeros(2, 64)).shape
    torch.Size([2, 3, 4, 4])
    """

    def __init__(
        self,
        resolution: int = 128,
        fmap_base: int = 8192,
        fmap_max: int = 512,
        latent: int | None = None,
        colours: int = 3,
        surgery: Mapping[str, Any] | None = None,
        discriminator_surgery: Mapping[str, Any] | None = None,
        growth: Mapping[str, Any] | None = None,
        penalty: float = 10.0,
        target: float = 1.0,
        drift: float = 0.001,
        mirror: bool = False,
        smoothing: float = 0.999,
        seed: int = 0,
        data_preprocessor: Any = None,
    ) -> None:
        super().__init__(data_preprocessor)
        keys = [each.name for each in fields(Growth) if each.init and each.name != "resolution"]
        given = {} if growth is None else mapping(growth, "growth", "a schedule", keys=keys)
        self.growth = Growth(resolution=resolution, **given)
        weights = {"penalty": penalty, "target": target, "drift": drift}
        self.weights = {name: _number(value, name) for name, value in weights.items()}
        if target == 0:
            raise ValueError("target=0 must be more: it is what the gradient's norm is divided by")
        self.mirror, self.smoothing = flag(mirror, "mirror"), _number(smoothing, "smoothing")
        if smoothing >= 1:
            raise ValueError(f"smoothing={smoothing} must be less than 1")
        self.seed = whole_number(seed, "seed", at_least=0)
        self.colours = colours
        options = [None if each is None else SurgeryOptions.read(each) for each in (surgery, discriminator_surgery)]
        self.generator = progan(resolution, fmap_base, fmap_max, latent, colours)
        self.discriminator = discriminator(resolution, fmap_base, fmap_max, colours)
        self.latent = self.generator.latent
        for name, option in zip(("generator", "discriminator"), options, strict=True):
            if option is not None:
                _convert(getattr(self, name), name, option)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        # What the last step was about, for files.
        none_yet = [0, -1, self.growth.start, 1, 0]
        self.register_buffer("progress", torch.tensor(none_yet, dtype=torch.float64))
        self._known: tuple[int, Step] | None = None
        self._register_state_dict_hook(_name_as_unwrapped)

    def init_weights(self) -> None:
        """Keep the weights: mmengine would initialise the networks again."""

    @property
    def images_seen(self) -> int:
        """Real images that the discriminator has seen."""
        return self._progress()[0]

    @property
    def trained(self) -> Step:
        """What the last step was about; its phase is -1 where there was none."""
        return self._progress()[1]

    def forward(self, inputs: torch.Tensor, data_samples: Any = None, mode: str = "tensor") -> torch.Tensor:
        """Generate images by the average, as far as it has grown.

        Args:
            inputs: Latents ``(N, latent)``.
            data_samples: Not used.
            mode: Not used: a GAN has no single loss.

        Returns:
            ``(N, colours, H, W)``, for colours from -1 to 1.
        """
        step = self.trained
        images: torch.Tensor = self.average(inputs, step.resolution, step.fade)
        return images

    def train_step(self, data: torch.Tensor, optim_wrapper: OptimWrapperDict) -> dict[str, torch.Tensor]:
        """Train the discriminator and the generator once.

        Args:
            data: Real images of this process at the resolution of the step, ``(N, colours, H, W)`` unsigned bytes.
            optim_wrapper: Those of ``generator`` and ``discriminator``.

        Returns:
            Losses and progress, to be logged.

        Raises:
            ValueError: If the images are not as many or as large as the step takes.
        """
        seen, before = self._progress()
        step = self.growth.at(seen)
        if step.phase != before.phase:
            for each in optim_wrapper.values():
                each.optimizer.state.clear()
        images = self.data_preprocessor(data, True)
        reals, latents, more_latents, mix = self._draw(images, seen, step)
        critic, author = _bare(self.discriminator), _bare(self.generator)

        optimizer = optim_wrapper["discriminator"]
        with optimizer.optim_context(self.discriminator):
            with torch.no_grad():
                fakes = author(latents, step.resolution, step.fade)
            scored = partial(self.discriminator, fade=step.fade)
            losses = discriminator_losses(scored, reals, fakes, mix, loss_scale=_loss_scale(optimizer), **self.weights)
        loss, logged = self.parse_losses(losses)
        logged["loss_discriminator"] = logged.pop("loss")
        optimizer.update_params(loss)

        optimizer = optim_wrapper["generator"]
        critic.requires_grad_(False)
        with optimizer.optim_context(self.generator):
            loss = generator_loss(critic(self.generator(more_latents, step.resolution, step.fade), step.fade))
        optimizer.update_params(loss)
        critic.requires_grad_(True)
        with torch.no_grad():
            for kept, new in zip(self.average.parameters(), author.parameters(), strict=True):
                kept.lerp_(new, 1 - self.smoothing)

        self._known = seen + step.batch, step
        self.progress.copy_(torch.tensor([seen + step.batch, *step], dtype=torch.float64))
        progress = {"kimg": (seen + step.batch) / 1000, "resolution": step.resolution, "fade": step.fade}
        return {**logged, "loss_generator": loss.detach(), **{key: torch.tensor(v) for key, v in progress.items()}}

    def _draw(self, images: torch.Tensor, seen: int, step: Step) -> Sequence[torch.Tensor]:
        """Real images as the discriminator sees them, latents for each network, and shares of a mix."""
        rank, world = get_dist_info()
        side = step.resolution
        if images.shape[0] * world != step.batch or images.shape[-2:] != (side, side):
            raise ValueError(
                f"{images.shape[0]} images of {images.shape[-2]}×{images.shape[-1]} pixels came, where "
                f"{step.batch // world} of {side}×{side} are due: GrowingTrainLoop in train_cfg gives them"
            )
        chance = seeded(self.seed, seen)
        latents = [torch.randn(step.batch, self.latent, generator=chance) for _ in range(2)]
        mix, mirrored = (torch.rand(step.batch, generator=chance) for _ in range(2))
        *own, mirrored = (each[rank::world].to(images.device) for each in (*latents, mix, mirrored))
        reals = images.float() / 127.5 - 1
        if self.mirror:
            reals = torch.where((mirrored < 0.5)[:, None, None, None], reals, reals.flip(3))
        if step.fade < 1:
            coarse = F.interpolate(F.avg_pool2d(reals, 2), scale_factor=2.0, mode="nearest")
            reals = torch.lerp(coarse, reals, step.fade)
        return reals, *own

    def _progress(self) -> tuple[int, Step]:
        if self._known is None:  # after loading: reading it at every step would make a GPU wait
            seen, phase, resolution, fade, batch = self.progress.tolist()
            self._known = int(seen), Step(int(phase), int(resolution), fade, int(batch))
        return self._known

    # mmengine loads what fits and only logs what does not.
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {f"{prefix}{name}": value.shape for name, value in get_state_dict(self).items()}
        found = {name: value.shape for name, value in state_dict.items() if name.startswith(prefix)}
        if differing := [name for name in (*own, *found) if own.get(name) != found.get(name)]:
            there, here = (each.get(differing[0]) for each in (found, own))
            raise ValueError(
                f"the checkpoint is not of a GAN of this resolution ({self.growth.resolution}) and these widths: "
                f"{differing[0]} is {'missing' if there is None else tuple(there)} there and "
                f"{'missing' if here is None else tuple(here)} here. Give the model the resolution=, fmap_base=, "
                "fmap_max=, latent= and colours= that it was trained with"
            )
        self._known = None
        super()._load_from_state_dict(state_dict, prefix, *args)


def _convert(network: nn.Module, name: str, options: SurgeryOptions) -> None:
    if options.calibration is not None:
        raise ValueError(f"surgery: calibrate is for networks that take images of a data set, which a {name} does not")
    plan = options.saved_plan()
    if plan is None:
        options.convert(network)
    else:  # the work dir's is of the whole model
        options.apply(network, part_of_plan(plan, (f"{name}.", f"{name}.module.")) or plan)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {kind(value)}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value} must be at least 0")
    return float(value)


def _bare(network: Any) -> nn.Module:
    """A network without what wraps it for several processes."""
    return cast(nn.Module, network.module if is_model_wrapper(network) else network)


def _name_as_unwrapped(model: nn.Module, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
    """Save networks that are wrapped, each by itself, under the names that mmengine loads them by: those without."""
    for name, child in model.named_children():
        if is_model_wrapper(child):
            wrapped, bare = f"{prefix}{name}.module", f"{prefix}{name}"
            for names in (state, state._metadata):
                renamed = {
                    bare + key.removeprefix(wrapped) if key == wrapped or key.startswith(f"{wrapped}.") else key: value
                    for key, value in names.items()
                }
                names.clear()
                names.update(renamed)


def _loss_scale(optimizer: OptimWrapper) -> float:
    scaler = getattr(optimizer, "loss_scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
