"""Norms with the statistics and numbers that they might have after training."""

import torch


def randomise_norms(model, seed=1):
    """Give every norm of a network numbers by which it can be told from others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "running_mean", None), torch.Tensor):
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                if isinstance(getattr(module, "weight", None), torch.Tensor):
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.2, generator=generator)
