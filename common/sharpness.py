"""Sharpness that no rescaling of weights can change: what the loss gains when each weight moves by a share of itself.

A trace of the Hessian can be made as large or as small as one likes without changing the function: multiply the inputs
of a linear layer by c and divide its weights by c, and its Hessian grows by c² (Dinh et al., 2017). A step of each
weight that is a share of the weight itself is divided by c too, so that the loss it leads to stays what it was.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from common.hessian import Estimate
from common.risk import Risk, mean_loss, measuring, predict_with


@torch.no_grad()
def noise_sharpness(risk: Risk, noise: float = 0.1, draws: int = 16, seed: int = 0) -> Estimate:
    """Return E L(w ⊙ (1 + noise · ε)) − L(w), ε ~ N(0, 1) independently for each weight, in nats for cross-entropy.

    Args:
        risk: the loss L as a function of the weights w; see `common.risk.empirical_risk`.
        noise: standard deviation of a weight's step, as a share of the weight.
        draws: of ε, at least 2.
        seed: of the draws, which are made on the CPU: the same ones on every device.

    Raises:
        ValueError: noise is not above 0, or there are fewer than 2 draws.
    """
    if noise <= 0 or draws < 2:
        raise ValueError(f"noise must be above 0 and draws at least 2, got {noise:g} and {draws}")
    generator, start = torch.Generator().manual_seed(seed), mean_loss(risk)
    gains = []
    for _ in range(draws):
        steps = {
            name: noise * weight * torch.randn(weight.shape, generator=generator).to(weight)
            for name, weight in risk.parameters.items()
        }
        gains.append(_gained(risk, steps, start))
    found = torch.tensor(gains, dtype=torch.float64)
    return Estimate(found.mean().item(), (found.std() / draws**0.5).item(), draws)


def adaptive_sharpness(risk: Risk, radius: float = 0.5) -> float:
    """Return L(w + ε) − L(w) for the step ε of adaptive SAM (Kwon et al., 2021), in nats for cross-entropy.

    ε = radius · w² ⊙ g / ‖w ⊙ g‖ with g = ∇L(w) maximises the loss, to first order, among all steps with
    ‖ε / w‖ ≤ radius, the norm being taken over all weights together. It is 0 where the gradient is.

    Args:
        risk: as in `noise_sharpness`.
        radius: of the steps, as a share of the weights.

    Raises:
        ValueError: radius is not above 0.
    """
    if radius <= 0:
        raise ValueError(f"radius must be above 0, got {radius:g}")
    gradients = _gradients(risk)
    scaled = {name: weight.detach() * gradients[name] for name, weight in risk.parameters.items()}
    norm = torch.stack([each.double().square().sum() for each in scaled.values()]).sum().sqrt()
    if norm == 0:
        return 0.0
    steps = {name: (radius / norm) * weight.detach() * scaled[name] for name, weight in risk.parameters.items()}
    return _gained(risk, {name: step.to(risk.dtype) for name, step in steps.items()}, mean_loss(risk))


def _gained(risk: Risk, steps: Mapping[str, Tensor], start: float) -> float:
    """Return what the mean loss gains over `start` by a step of the weights, which stay as they are."""
    return mean_loss(risk, {name: weight + steps[name] for name, weight in risk.parameters.items()}) - start


def _gradients(risk: Risk) -> dict[str, Tensor]:
    weights = {name: weight.detach().requires_grad_() for name, weight in risk.parameters.items()}
    with measuring(risk), torch.enable_grad():
        total = sum(
            risk.loss(predict_with(risk, batch, weights), batch.kept) * risk.share(batch) for batch in risk.data
        )
        found = torch.autograd.grad(total, list(weights.values()))
    return dict(zip(risk.parameters, found, strict=True))
