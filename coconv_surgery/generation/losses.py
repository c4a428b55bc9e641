"""The losses of ProGAN: Wasserstein with gradient penalty and drift (Karras et al., 2018, appendix A.1)."""

from collections.abc import Callable

import torch

_MOST_SCALE = 1024.0  # gradients that are to be near 1 must not pass what half precision can hold, 65,504


def generator_loss(scores: torch.Tensor) -> torch.Tensor:
    """What the generator minimises.

    Args:
        scores: Of generated images, ``(N,)``.
    """
    return -scores.float().mean()


def discriminator_losses(
    discriminator: Callable[[torch.Tensor], torch.Tensor],
    reals: torch.Tensor,
    fakes: torch.Tensor,
    mix: torch.Tensor,
    *,
    penalty: float = 10.0,
    target: float = 1.0,
    drift: float = 0.001,
    loss_scale: float = 1.0,
) -> dict[str, torch.Tensor]:
    """What the discriminator minimises the sum of.

    Args:
        discriminator: Scores images.
        reals: Real images, ``(N, C, H, W)``.
        fakes: Generated images, without gradients.
        mix: Share of the generated image at which the gradient is taken, for every pair, ``(N,)``.
        penalty: Weight of the penalty on the norms of gradients.
        target: What the norms should be. The ProGAN paper takes 750 for CIFAR-10 (appendix D), else 1.
        drift: Weight of the squares of real scores, which keeps them near zero.
        loss_scale: What the gradient is scaled with on its way, so that half precision can hold it; 1,024 at most.

    Returns:
        ``loss_wasserstein``, ``loss_penalty`` and ``loss_drift``.
    """
    real_scores, fake_scores = discriminator(reals).float(), discriminator(fakes).float()
    loss_scale = min(loss_scale, _MOST_SCALE)
    mixed = torch.lerp(reals, fakes.to(reals.dtype), mix[:, None, None, None]).requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(mixed).float().sum() * loss_scale, mixed, create_graph=True)
    norms = (gradient.float() / loss_scale).flatten(1).norm(dim=1)
    return {
        "loss_wasserstein": fake_scores.mean() - real_scores.mean(),
        "loss_penalty": penalty / target**2 * (norms - target).square().mean(),
        "loss_drift": drift * real_scores.square().mean(),
    }
