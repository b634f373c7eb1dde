"""Curvature of the loss: traces with standard errors, top eigenvalues and spectral densities, on curvlinops.

The loss is a mean over labels, ℓ(θ) = 1/N Σ_n ℓ(f_θ(x)_n, y_n): one label per image, or per token in a language model.
`empirical_risk` ties model, batches and parameters together; the other functions measure what it returns. With J_n the
Jacobian of the logits of label n and p_n = softmax(f_n), the kinds of curvature are

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
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import send_to_device
from curvlinops import EFLinearOperator, FisherMCLinearOperator, GGNLinearOperator, HessianLinearOperator
from curvlinops import xtrace as curvlinops_xtrace
from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

KINDS = ("hessian", "ggn", "fisher", "sampled_fisher", "empirical_fisher")
EXACT = ("fisher", "empirical_fisher")  # kinds whose trace is a sum, not an estimate

Inputs = Tensor | Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """An estimated number, its standard error (0 if it is exact) and the number of samples of which it is the mean."""

    mean: float
    standard_error: float
    samples: int


@dataclass(frozen=True)
class Risk:
    """A mean loss as a function of some parameters of a model; `empirical_risk` makes it."""

    network: nn.Module
    loss: nn.Module
    parameters: dict[str, nn.Parameter]
    data: list[tuple[dict[str, Any], Tensor]]  # each batch with all its labels (B, …), and the n that count, flat
    labels: int  # N, how many count in all batches

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters.values())).device

    @property
    def dimension(self) -> int:
        """The size of the curvature matrix: the number of entries of all parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())


def model_logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return what a model predicts: `model(inputs)`, or the logits of `model(**inputs)` for a mapping."""
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return output if isinstance(output, Tensor) else output.logits


def empirical_risk(
    model: nn.Module,
    batches: Iterable[Any],
    parameters: Sequence[str] | None = None,
    loss: nn.Module | None = None,
    logits: Callable[[nn.Module, Inputs], Tensor] = model_logits,
) -> Risk:
    """Return the mean loss of a model over all labels of the batches, as a function of the chosen parameters.

    A frozen head, or any other way from inputs to logits, goes into `logits`:

        empirical_risk(encoder, batches, logits=lambda encoder, images: F.normalize(encoder(images), dim=-1) @ head.T)

    Args:
        model: any module; it is not copied, so that later changes of its weights are seen.
        batches: read once, kept and moved to the model's device: pairs (inputs, labels), or mappings with the entry
            "labels", which go to `logits` as a whole (Hugging Face models take labels). All tensors start with the
            dimension of the B samples. Labels (B,) or (B, T); the loss's `ignore_index` (−100) marks those that do
            not count. Batches may differ in size: each label counts once.
        parameters: names, or patterns ("blocks.*.mlp.fc?.weight"); None: all that require a gradient.
        loss: maps logits (n, C) and labels (n,) to their mean; cross-entropy by default.
        logits: maps (model, inputs) to logits (B, C) or (B, T, C).

    Raises:
        ValueError: no parameter has such a name, there is no label, or the loss is not a mean.
    """
    loss = nn.CrossEntropyLoss() if loss is None else loss
    if getattr(loss, "reduction", None) != "mean":
        raise ValueError(f"loss must be a module with reduction='mean', got {loss!r}")
    chosen = _chosen(model, parameters)
    device, ignored = next(iter(chosen.values())).device, getattr(loss, "ignore_index", -100)
    data = []
    for batch in batches:
        batch = send_to_device(batch, device)
        inputs, labels = (batch, batch["labels"]) if isinstance(batch, Mapping) else batch
        kept = labels[labels != ignored]
        if len(kept):
            data.append(({"inputs": inputs, "labels": labels}, kept))
    if not data:
        raise ValueError("batches hold no label that counts: nothing to measure the curvature on")
    return Risk(_Network(model, logits, ignored), loss, chosen, data, sum(len(kept) for _, kept in data))


def _chosen(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Parameter]:
    named = dict(model.named_parameters())
    if patterns is None:
        patterns, named = ["*"], {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    for pattern in patterns:
        if not fnmatch.filter(named, pattern):
            near = difflib.get_close_matches(pattern, named, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]!r}?" if near else ", which has none that requires a gradient"
            raise ValueError(f"no parameter of {type(model).__name__} matches {pattern!r}{hint}")
    kept = (name for name in named if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
    return {name: named[name] for name in kept}


class _Network(nn.Module):
    """The model as curvlinops calls it: it maps a batch to the logits (n, C) of the labels that count."""

    def __init__(self, model: nn.Module, logits: Callable[[nn.Module, Inputs], Tensor], ignored: int):
        super().__init__()
        self.model, self.logits, self.ignored = model, logits, ignored

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        labels = batch["labels"]
        found = self.logits(self.model, batch["inputs"])  # (B, …, C)
        if found.shape[:-1] != labels.shape:
            raise ValueError(
                f"logits of shape {tuple(found.shape)} do not fit labels of shape {tuple(labels.shape)}: expected "
                "labels (B,) with logits (B, C), or (B, T) with (B, T, C); adapt `logits`"
            )
        return found.flatten(0, -2)[labels.flatten() != self.ignored]

    def counted(self, batch: Mapping[str, Any]) -> int:
        return int((batch["labels"] != self.ignored).sum())


@contextlib.contextmanager
def _measuring(risk: Risk) -> Iterator[None]:
    """Set evaluation mode and plain attention within the block, and restore what was set before."""
    modes = {module: module.training for module in risk.network.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    risk.network.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _seeded(risk: Risk, seed: int) -> Iterator[None]:
    """Seed torch's global generator, which curvlinops draws from, within the block, and restore it."""
    with torch.random.fork_rng([risk.device] if risk.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def mean_loss(risk: Risk) -> float:
    """Return the mean loss itself, in nats for cross-entropy."""
    with _measuring(risk):
        return sum(risk.loss(risk.network(batch), kept).item() * len(kept) / risk.labels for batch, kept in risk.data)


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
        ValueError: as `trace` does, or `products` is odd or not below the number of parameters.
    """
    _check(risk, kind, products=products, repeats=repeats)
    if products % 2 or products >= risk.dimension:
        raise ValueError(f"products must be even and below the number of parameters, {risk.dimension}, got {products}")
    with _measuring(risk), _seeded(risk, seed):
        operator = _operator(risk, kind, seed)
        found = torch.stack([curvlinops_xtrace(operator, products).double().cpu() for _ in range(repeats)])
    return _estimate(found)


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
    with _measuring(risk):
        if kind in ("hessian", "ggn"):
            return _probed(risk, kind, probes, generator, at_once)
        return _squared_gradients(risk, kind, probes, generator, at_once)


def _probed(risk: Risk, kind: str, probes: int, generator: torch.Generator, at_once: int) -> Tensor:
    operator, shapes = _operator(risk, kind), [parameter.shape for parameter in risk.parameters.values()]
    like, found = next(iter(risk.parameters.values())), []
    for start in range(0, probes, at_once):
        count = min(at_once, probes - start)
        drawn = [[torch.randint(2, shape, generator=generator) for shape in shapes] for _ in range(count)]
        signs = [torch.stack(same, -1).to(like).mul_(2).sub_(1) for same in zip(*drawn, strict=True)]  # (…, count)
        products = zip(signs, operator @ signs, strict=True)
        found.append(torch.stack([(v * av).double().reshape(-1, count).sum(0).cpu() for v, av in products], 1))
    return torch.cat(found)


def _squared_gradients(risk: Risk, kind: str, draws: int, generator: torch.Generator, at_once: int) -> Tensor:
    """Return 1/N Σ ‖gradient‖² for each parameter: (1, parameters), or for each draw of labels (draws, parameters)."""
    total = torch.zeros(draws if kind == "sampled_fisher" else 1, len(risk.parameters), dtype=torch.float64)
    for batch, _ in risk.data:
        for sample in _split(batch):
            logits, pull = vjp(partial(_functional, risk, sample), risk.parameters)  # (n, C)
            if kind == "sampled_fisher":
                total += _squares(pull, _drawn(logits, draws, generator), at_once)
                continue
            by_label = _by_class(logits) if kind == "fisher" else _at_labels(risk, logits, sample["labels"])
            for row, vectors in enumerate(by_label):  # (C or 1, C)
                alone = logits.new_zeros(len(vectors), *logits.shape)  # nothing but this label
                alone[:, row] = vectors
                total += _squares(pull, alone, at_once).sum(0)
    return total / risk.labels


def _split(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the samples of a batch as batches of one; entries that are no tensors go into each."""
    count = len(batch["labels"])

    def part(entry: Any, index: int) -> Any:
        if isinstance(entry, Mapping):
            return {name: part(value, index) for name, value in entry.items()}
        return entry[index : index + 1] if isinstance(entry, Tensor) and entry.ndim and len(entry) == count else entry

    for index in range(count):
        yield part(batch, index)


def _functional(risk: Risk, sample: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Tensor:
    named = {f"model.{name}": parameter for name, parameter in parameters.items()}
    return functional_call(risk.network, named, (sample,))


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


def _at_labels(risk: Risk, logits: Tensor, labels: Tensor) -> Tensor:
    """Return ∇_f ℓ of each label, (n, 1, C)."""
    true = labels[labels != risk.network.ignored]
    return len(true) * torch.func.grad(risk.loss)(logits, true)[:, None]


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
        ValueError: as `trace` does, or `count` is not smaller than the number of parameters.
    """
    _check(risk, kind, count=count)
    if count >= risk.dimension:
        raise ValueError(f"count must be below the number of parameters, {risk.dimension}, got {count}")
    with _measuring(risk):
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
        ValueError: as `trace` does, or `steps` is not in 2 … number of parameters − 1.
    """
    _check(risk, kind, points=points, repeats=repeats)
    if not 2 <= steps < risk.dimension:
        raise ValueError(f"steps must be at least 2 and below the number of parameters, {risk.dimension}, got {steps}")
    with _measuring(risk), _seeded(risk, seed):
        low = _extreme(risk, kind, 1, "SA", seed, 1e-2).item() if kind == "hessian" else 0.0  # the others have none < 0
        ends = low, _extreme(risk, kind, 1, "LA", seed, 1e-2).item()
        return lanczos_approximate_spectrum(_operator(risk, kind, seed), steps, points, repeats, boundaries=ends)


def _extreme(risk: Risk, kind: str, count: int, side: str, seed: int, tolerance: float) -> np.ndarray:
    """Return eigenvalues at one end of the spectrum, ascending."""
    operator = _operator(risk, kind, seed).to_scipy()
    start = np.random.default_rng(seed).standard_normal(risk.dimension)
    if not (operator @ start).any():  # ARPACK refuses the zero matrix, which a dead layer has
        return np.zeros(count)
    vectors = min(risk.dimension, 2 * count + 8)  # fewer than scipy's 20: a product is expensive, a restart is not
    return np.sort(eigsh(operator, count, which=side, ncv=vectors, v0=start, tol=tolerance, return_eigenvectors=False))


# Operators and checks ------------------------------------------------------------------------------------------------


def _operator(risk: Risk, kind: str, seed: int = 0) -> Any:
    """Return the curvature matrix as curvlinops' linear operator, never formed."""
    classes = {"hessian": HessianLinearOperator, "ggn": GGNLinearOperator, "fisher": GGNLinearOperator}
    classes |= {"sampled_fisher": FisherMCLinearOperator, "empirical_fisher": EFLinearOperator}
    return classes[kind](
        risk.network, risk.loss, list(risk.parameters.values()), risk.data,
        check_deterministic=False, num_data=risk.labels, batch_size_fn=risk.network.counted,
        **({"seed": seed} if kind == "sampled_fisher" else {}),
    )  # fmt: skip


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
