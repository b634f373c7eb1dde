"""Curvature of the loss: traces with standard errors, top eigenvalues and spectral densities.

The loss is a mean over labels, ℓ(θ) = 1/N Σ_n ℓ(f_θ(x)_n, y_n): one label per image, or per token in a language model.
`common.risk.empirical_risk` ties model, batches and parameters together; the functions here measure what it returns.
With J_n the Jacobian of the logits of label n and p_n = softmax(f_n), the kinds of curvature are

    hessian             ∇² ℓ, of any twice differentiable loss
    ggn                 1/N Σ J_nᵀ (∇²_f ℓ) J_n = 1/N Σ J_nᵀ (diag p_n − p_n p_nᵀ) J_n for cross-entropy
    fisher              1/N Σ E_{y ~ p_n} ∇ log p_n(y) ∇ log p_n(y)ᵀ: for cross-entropy the same matrix as the GGN, its
                        trace computed exactly, class by class
    sampled_fisher      the same with labels drawn from the model
    empirical_fisher    the same with the true labels

All run in evaluation mode and with the plain form of attention, since fused attention has no forward differentiation;
both are restored afterwards. Everything is linear in the loss's unit (nats) and depends on the scale of the parameters:
compare models only where that scale means the same.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap

from common.risk import Batch, Risk, empirical_risk, mean_loss, measuring, model_logits, predict_with

__all__ = ["EXACT", "KINDS", "Estimate", "Risk", "empirical_risk", "mean_loss", "model_logits", "per_block",
           "spectral_density", "top_eigenvalues", "trace", "xtrace"]  # fmt: skip

KINDS = ("hessian", "ggn", "fisher", "sampled_fisher", "empirical_fisher")
EXACT = ("fisher", "empirical_fisher")  # kinds whose trace is a sum, not an estimate


@dataclass(frozen=True)
class Estimate:
    """An estimated number, its standard error (0 if it is exact) and the number of samples of which it is the mean."""

    mean: float
    standard_error: float
    samples: int


@contextlib.contextmanager
def _seeded(risk: Risk, seed: int) -> Iterator[None]:
    """Seed torch's global generator, which Lanczos draws from, within the block, and restore it."""
    with torch.random.fork_rng([risk.device] if risk.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# Traces --------------------------------------------------------------------------------------------------------------


def trace(risk: Risk, kind: str = "hessian", probes: int = 100, seed: int = 0, at_once: int = 8) -> Estimate:
    """Return the trace of a curvature matrix, tr(A), over all parameters of the risk.

    "hessian" and "ggn" use Hutchinson's estimator, tr(A) = E vᵀ A v with random signs v; "sampled_fisher" uses labels
    drawn from the model, tr(F) = E ‖∇ log p(y)‖². "fisher" (a sum over all classes) and "empirical_fisher" are exact.

    Time: a probe takes about as long as 4 to 6 gradients of all batches. The Fishers take one forward pass for each
    sample, and a backward pass for each label and class ("fisher"), each draw or each label. Exact "fisher" is for
    tens of classes, not for a vocabulary. Memory: `at_once` times that of one gradient.

    Args:
        risk: model, data and parameters.
        kind: one of KINDS.
        probes: random vectors, or labels drawn for each sample; the exact kinds need none.
        seed: of the probes or labels; torch's global generator is not touched.
        at_once: how many vectors are multiplied with the matrix at a time; it does not change the estimate.

    Returns:
        mean and standard error over the probes (NaN for a single one), for these data.

    Raises:
        ValueError: kind or a number is out of range, or the loss is not an unweighted cross-entropy, which all kinds
            but "hessian" need.
    """
    return _estimate(_samples(risk, kind, probes, seed, at_once).sum(1), kind in EXACT)


def xtrace(risk: Risk, kind: str = "ggn", products: int = 32, repeats: int = 4, seed: int = 0) -> Estimate:
    """Return the trace of a curvature matrix by XTrace (Epperly, Tropp and Webber, 2024), unbiased as `trace` is.

    It projects out the largest eigenvalues, and so needs far fewer products than Hutchinson's estimator where few of
    them make up the trace, as in a GGN: take it for one with too many classes for "fisher". It helps little with a
    Hessian, whose trace is a small difference of large parts. It gives no traces of single blocks.

    Time: `repeats` × `products` products with the matrix. Memory: products / 2 vectors of all parameters several times
    over, and as many gradients at a time.

    Args:
        risk: model, data and parameters.
        kind: one of KINDS; for "sampled_fisher" one label is drawn for each that counts.
        products: how many products with the matrix one repeat takes; even.
        repeats: independent estimates, from which the standard error comes.
        seed: of the probes; torch's global generator is left as it was.

    Returns:
        mean and standard error over the repeats (NaN for a single one), for these data.

    Raises:
        ValueError: as `trace` does, `products` is odd or not below the number of parameters, or these are half
            precision.
    """
    _check(risk, kind, products=products, repeats=repeats)
    _check_precision(risk)
    if products % 2 or products >= risk.dimension:
        raise ValueError(f"products must be even and below the number of parameters, {risk.dimension}, got {products}")
    generator = torch.Generator().manual_seed(seed)
    with measuring(risk):
        operator = _Curvature(risk, kind, seed)
        found = torch.stack([_xtrace(operator, products // 2, generator) for _ in range(repeats)])
    return _estimate(found)


def _xtrace(operator: "_Curvature", count: int, generator: torch.Generator) -> Tensor:
    """Return one estimate from `count` random vectors, (): the mean over all of leaving each one out.

    With Y = A W = Q R, and s_i the normalised columns of R⁻ᵀ, Q (1 − s_i s_iᵀ) Qᵀ projects on what the others span.
    """
    signs = (
        torch.randint(2, (operator.shape[0], count), generator=generator).to(operator.device, operator.dtype) * 2 - 1
    )
    image = operator @ signs  # Y
    basis, singular, _ = torch.linalg.svd(image, full_matrices=False)
    kept = singular > 10 * count * torch.finfo(operator.dtype).eps * singular[0]
    if not kept.all():  # a matrix of lower rank, all of whose range is seen: 0 of a dead layer
        basis = basis[:, kept]
        return (basis * (operator @ basis)).sum().double().cpu() if kept.any() else torch.zeros((), dtype=torch.float64)
    basis, triangle = torch.linalg.qr(image)
    seen = operator @ basis  # A Q
    inner, along = basis.mT @ seen, basis.mT @ signs
    left_out = nn.functional.normalize(torch.linalg.inv(triangle.mT), dim=0)  # columns s_i
    others = along - left_out * (left_out * along).sum(0)
    rest, image_of_rest = signs - basis @ others, image - seen @ others
    traces = inner.trace() - (left_out * (inner @ left_out)).sum(0) + (rest * image_of_rest).sum(0)
    return traces.double().mean().cpu()


def per_block(
    risk: Risk,
    kind: str = "hessian",
    probes: int = 100,
    seed: int = 0,
    at_once: int = 8,
    block: Callable[[str], str] = str,
) -> pd.DataFrame:
    """Return the trace of each diagonal block of a curvature matrix, for all blocks from the same probes.

    Every block is estimated without bias by tr(A_bb) = E v_bᵀ (A v)_b; the other blocks only add to its variance. The
    blocks' traces add up to `trace` with the same arguments.

    Args:
        risk, kind, probes, seed, at_once: as in `trace`.
        block: maps a parameter's name to that of its block; by default each parameter is one.

    Returns:
        one row per block, in module order, with the columns trace, standard_error, samples and entries (its size).

    Raises:
        ValueError: as `trace` does.
    """
    samples, rows = _samples(risk, kind, probes, seed, at_once), {}
    members: dict[str, list[int]] = {}
    for index, name in enumerate(risk.parameters):
        members.setdefault(block(name), []).append(index)
    sizes = [parameter.numel() for parameter in risk.parameters.values()]
    for name, indices in members.items():
        found = _estimate(samples[:, indices].sum(1), kind in EXACT)
        rows[name] = dict(trace=found.mean, standard_error=found.standard_error, samples=found.samples)
        rows[name]["entries"] = sum(sizes[index] for index in indices)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("block")


def _estimate(samples: Tensor, exact: bool = False) -> Estimate:
    unknown = 0.0 if exact else float("nan")  # the error of a single sample
    error = samples.std().item() / len(samples) ** 0.5 if len(samples) > 1 else unknown
    return Estimate(samples.mean().item(), error, len(samples))


def _samples(risk: Risk, kind: str, probes: int, seed: int, at_once: int) -> Tensor:
    """Return each probe's trace of each parameter's diagonal block, (probes, parameters) float64; 1 row if exact."""
    _check(risk, kind, probes=probes, at_once=at_once)
    generator = torch.Generator().manual_seed(seed)
    with measuring(risk):
        if kind in ("hessian", "ggn"):
            return _probed(risk, kind, probes, generator, at_once)
        return _squared_gradients(risk, kind, probes, generator, at_once)


def _probed(risk: Risk, kind: str, probes: int, generator: torch.Generator, at_once: int) -> Tensor:
    operator, found = _Curvature(risk, kind), []
    for start in range(0, probes, at_once):
        count = min(at_once, probes - start)
        drawn = [
            {name: torch.randint(2, one.shape, generator=generator) for name, one in risk.parameters.items()}
            for _ in range(count)
        ]
        signs = {
            name: torch.stack([one[name] for one in drawn]).to(parameter).mul_(2).sub_(1)  # (count, …)
            for name, parameter in risk.parameters.items()
        }
        products = operator.products(signs)
        along = [(signs[name] * products[name]).double().reshape(count, -1).sum(1).cpu() for name in signs]
        found.append(torch.stack(along, 1))
    return torch.cat(found)


def _squared_gradients(risk: Risk, kind: str, draws: int, generator: torch.Generator, at_once: int) -> Tensor:
    """Return 1/N Σ ‖gradient‖² for each parameter: (1, parameters), or for each draw of labels (draws, parameters)."""
    total = torch.zeros(draws if kind == "sampled_fisher" else 1, len(risk.parameters), dtype=torch.float64)
    for batch in risk.data:
        for sample in _split(risk, batch):
            logits, pull = vjp(partial(predict_with, risk, sample), risk.parameters)  # (n, C)
            if kind == "sampled_fisher":
                total += _squares(pull, _drawn(logits, draws, generator), at_once)
                continue
            by_label = _by_class(logits) if kind == "fisher" else _at_labels(risk, logits, sample)[:, None]
            for row, vectors in enumerate(by_label):  # (C or 1, C)
                alone = logits.new_zeros(len(vectors), *logits.shape)  # nothing but this label
                alone[:, row] = vectors
                total += _squares(pull, alone, at_once).sum(0)
    return total / risk.labels


def _split(risk: Risk, batch: Batch) -> Iterator[Batch]:
    """Yield the samples of a batch as batches of one; entries that are no tensors go into each."""
    count = len(batch.labels)

    def part(entry: Any, index: int) -> Any:
        if isinstance(entry, Mapping):
            return {name: part(value, index) for name, value in entry.items()}
        return entry[index : index + 1] if isinstance(entry, Tensor) and entry.ndim and len(entry) == count else entry

    for index in range(count):
        labels = batch.labels[index : index + 1]
        ignored = risk.network.ignored
        if labels.is_floating_point():
            kept = labels.flatten(0, -2)
        else:
            kept = labels.flatten() if ignored is None else labels[labels != ignored]
        yield replace(batch, inputs=part(batch.inputs, index), labels=labels, kept=kept, count=len(kept))


def _squares(pull: Callable, vectors: Tensor, at_once: int) -> Tensor:
    """Return ‖Jᵀ v‖² of each v (vectors, n, C) for each parameter: (vectors, parameters) float64."""
    found = []
    for part in vectors.split(at_once):
        gradients = vmap(pull)(part)[0].values()
        norms = [torch.linalg.vector_norm(g.reshape(len(part), -1), dim=1).double() for g in gradients]
        found.append(torch.stack(norms, 1).square())
    return torch.cat(found).cpu()


def _drawn(logits: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Return −∇_f Σ_n log p(y_n) for draws of all labels of a sample, (draws, n, C): E[cross terms] of labels is 0."""
    shares = logits.softmax(-1)
    labels = torch.multinomial(shares.cpu(), draws, replacement=True, generator=generator).T  # (draws, n)
    return shares - nn.functional.one_hot(labels, shares.shape[-1]).to(shares)


def _by_class(logits: Tensor) -> Tensor:
    """Return √p_c · (p − e_c) for each label and class c, (n, C, C): diag p − p pᵀ is the sum of their squares."""
    shares = logits.softmax(-1)
    return shares.sqrt()[..., None] * (shares[:, None] - torch.eye(shares.shape[-1]).to(shares))


def _at_labels(risk: Risk, logits: Tensor, batch: Batch) -> Tensor:
    """Return ∇_f ℓ of each label, (n, C)."""
    return len(batch.kept) * grad(risk.loss)(logits, batch.kept)


# Spectra -------------------------------------------------------------------------------------------------------------


def top_eigenvalues(
    risk: Risk, count: int = 1, kind: str = "hessian", seed: int = 0, tolerance: float = 1e-3
) -> np.ndarray:
    """Return the largest eigenvalues of a curvature matrix, in descending order (Lanczos, scipy's eigsh).

    Time: 2·count + 9 products with the matrix if the largest eigenvalues are well separated, else up to a few times as
    many. Memory: 2·count + 8 vectors of all parameters in float64.

    Args:
        risk: model, data and parameters.
        count: how many; largest by value, not by magnitude.
        kind: one of KINDS; for "sampled_fisher" one label is drawn for each that counts.
        seed: of the start vector and of drawn labels.
        tolerance: relative accuracy.

    Returns:
        (count,), in the unit of the loss.

    Raises:
        ValueError: as `trace` does, `count` is not smaller than the number of parameters, or these are half precision.
    """
    _check(risk, kind, count=count)
    _check_precision(risk)
    if count >= risk.dimension:
        raise ValueError(f"count must be below the number of parameters, {risk.dimension}, got {count}")
    with measuring(risk):
        return _extreme(risk, kind, count, "LA", seed, tolerance)[::-1]


def spectral_density(
    risk: Risk, kind: str = "hessian", steps: int = 64, points: int = 1024, repeats: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the density of a curvature matrix's eigenvalues, by Lanczos quadrature with Gaussian bumps.

    Algorithm 2 of Papyan (JMLR 21, 2020), in which `steps` sets the width of the bumps, 1/steps of the spectrum: the
    mass near 0, where almost all eigenvalues lie, comes out as one bump of that width.

    Args:
        risk, kind: as in `top_eigenvalues`.
        steps: Lanczos vectors, each a product with the matrix.
        points: of the grid.
        repeats: start vectors that are averaged.
        seed: of the start vectors; torch's global generator is left as it was.

    Returns:
        eigenvalues (points,) and density (points,); its integral is 1, less the tails of bumps beyond the ends.

    Raises:
        ValueError: as `trace` does, `steps` is not in 2 … number of parameters − 1, parameters are half precision, or
            the matrix has fewer distinct eigenvalues than steps.
    """
    _check(risk, kind, points=points, repeats=repeats)
    _check_precision(risk)
    if not 2 <= steps < risk.dimension:
        raise ValueError(f"steps must be at least 2 and below the number of parameters, {risk.dimension}, got {steps}")
    with measuring(risk), _seeded(risk, seed):
        low = _extreme(risk, kind, 1, "SA", seed, 1e-2).item() if kind == "hessian" else 0.0  # the others have none < 0
        ends = low, _extreme(risk, kind, 1, "LA", seed, 1e-2).item()
        if ends == (0, 0):
            raise ValueError(f"{kind!r} is zero (a dead layer?): its spectrum is the single value 0, without a density")
        try:
            operator = _Curvature(risk, kind, seed)
            return lanczos_approximate_spectrum(operator, steps, points, repeats, boundaries=ends)
        except torch.linalg.LinAlgError:
            raise ValueError(
                f"{kind!r} has fewer than {steps} distinct eigenvalues (dead units?): take fewer steps"
            ) from None


def _extreme(risk: Risk, kind: str, count: int, side: str, seed: int, tolerance: float) -> np.ndarray:
    """Return eigenvalues at one end of the spectrum, ascending."""
    operator = _Curvature(risk, kind, seed).to_scipy()
    start = np.random.default_rng(seed).standard_normal(risk.dimension)
    if not (operator @ start).any():  # ARPACK refuses the zero matrix, which a dead layer has
        return np.zeros(count)
    vectors = min(risk.dimension, 2 * count + 8)  # fewer than scipy's 20: a product is expensive, a restart is not
    return np.sort(eigsh(operator, count, which=side, ncv=vectors, v0=start, tol=tolerance, return_eigenvectors=False))


# Products and checks -------------------------------------------------------------------------------------------------


class _Curvature:
    """The curvature matrix (P, P) as a linear operator, never formed, in the form that scipy and Lanczos take it."""

    def __init__(self, risk: Risk, kind: str, seed: int = 0) -> None:
        self.risk, self.kind, self.seed = risk, kind, seed
        self.shape, self.device, self.dtype = (risk.dimension, risk.dimension), risk.device, risk.dtype

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Return the product with a vector (P,) or a matrix (P, k)."""
        columns = vectors.T if vectors.ndim == 2 else vectors[None]  # (k, P)
        sizes = [parameter.numel() for parameter in self.risk.parameters.values()]
        parts = zip(self.risk.parameters.items(), columns.split(sizes, 1), strict=True)
        named = {name: part.reshape(-1, *parameter.shape).to(parameter) for (name, parameter), part in parts}
        products = torch.cat([product.flatten(1) for product in self.products(named).values()], 1)  # (k, P)
        return products.T if vectors.ndim == 2 else products[0]

    @torch.no_grad()  # for the caller: torch.func differentiates all the same
    def products(self, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the products with k vectors, each parameter's part as (k, …)."""
        total = {name: torch.zeros_like(vector) for name, vector in vectors.items()}
        generator = torch.Generator().manual_seed(self.seed)  # the same labels are drawn for every product
        for batch in self.risk.data:
            found = vmap(self._product(batch, generator))(vectors)
            for name, product in found.items():
                total[name].add_(product, alpha=self.risk.share(batch))
        return total

    def _product(self, batch: Batch, generator: torch.Generator) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        """Return the map from a vector to the product of one batch's matrix with it."""
        risk, parameters = self.risk, {name: one.detach() for name, one in self.risk.parameters.items()}
        predict = partial(predict_with, risk, batch)
        if self.kind == "hessian":
            # Two backward passes: the matrix is symmetric. Forward derivatives through a Jacobian are wrong in torch's
            # fused norms; those of a gradient are right, but run the model again for each vector.
            _, pull = vjp(grad(lambda parameters: risk.loss(predict(parameters), batch.kept)), parameters)
            return lambda vector: pull(vector)[0]
        logits, pull = vjp(predict, parameters)  # (n, C)
        middle = self._middle(batch, logits, generator)
        return lambda vector: pull(middle(jvp(predict, (parameters,), (vector,))[1]) / len(logits))[0]

    def _middle(self, batch: Batch, logits: Tensor, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """Return the map from tangents of the logits (n, C) to their products with the matrix (C, C) of each label."""
        if self.kind in ("ggn", "fisher"):
            shares = logits.softmax(-1)  # p
            return lambda tangent: shares * (tangent - torch.linalg.vecdot(shares, tangent)[:, None])  # diag p − p pᵀ
        if self.kind == "sampled_fisher":
            gradient = _drawn(logits, 1, generator)[0]
        else:
            gradient = _at_labels(self.risk, logits, batch)
        return lambda tangent: gradient * torch.linalg.vecdot(gradient, tangent)[:, None]

    def to_scipy(self) -> LinearOperator:
        """Return the operator for vectors of float64 in numpy."""

        def product(vectors: np.ndarray) -> np.ndarray:
            moved = torch.from_numpy(np.ascontiguousarray(vectors)).to(self.device, self.dtype)
            return (self @ moved).double().cpu().numpy()

        return LinearOperator(self.shape, matvec=lambda v: product(v.reshape(-1)), matmat=product, dtype=np.float64)


def _check_precision(risk: Risk) -> None:
    for name, parameter in risk.parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {parameter.dtype}, too coarse for this: call .float() on the model")


def _check(risk: Risk, kind: str, **numbers: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}, expected one of {', '.join(KINDS)}")
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    plain = isinstance(risk.loss, nn.CrossEntropyLoss) and risk.loss.weight is None
    if kind != "hessian" and not plain:
        raise ValueError(
            f"{kind!r} needs a loss whose labels follow softmax(logits), nn.CrossEntropyLoss without class weights, "
            f"got {risk.loss!r}: measure 'hessian', or leave out `loss`"
        )
