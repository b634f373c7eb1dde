"""The equations that tie activation sparsity to flatness, as functions of sums over entries, tokens and samples.

Source: "Towards the Connection between Activation Sparsity and Flat Minima", arXiv 2605.25612, theory section. In an
MLP block with input tokens x_t, pre-activations p = K x, activations a = σ(p) and outputs z = V a, let L be the loss of
one sample, g = ∂L/∂a and η = ∂L/∂p = g ⊙ σ'(p). Per token ‖∂L/∂K‖² = ‖x_t‖² ‖η_t‖², and so

    AF_K = E_sample Σ_t ‖x_t‖² ‖η_t‖²            augmented flatness of the key layer
    E ‖a‖₀ = AF_K / C_0                          C_0: mean over active entries of ‖x_t‖² η²
    density = AF_K / (T d_ff C_0)                exact where σ' = 0 off the active entries: ReLU, JSReLU
    AF_V = E_sample Σ_t ‖a_t‖² ‖∂L/∂z_t‖²        augmented flatness of the value layer
    E ‖a‖² = AF_V / C_2                          C_2: mean over tokens of ‖∂L/∂z_t‖², weighted by ‖a_t‖²

AF is what training lowers; C_0, input norm × activation gradient, is what has to stay up for activations to be sparse.
"""

import math
from collections.abc import Iterable, Mapping

Sums = Mapping[str, float]


def ratio(numerator: float, denominator: float) -> float:
    """Return numerator / denominator, NaN where there is nothing to divide by."""
    return numerator / denominator if denominator else math.nan


def densities(sums: Sums) -> dict[str, float]:
    """Return the forward statistics of one layer.

    Args:
        sums: over all recorded passes: "entries", "tokens", "samples", "units" (d_ff), "calls" (of the block), "active"
            (entries with |a| > zero), "differentiable" (entries with σ'(p) ≠ 0), "union" (over calls: share of units
            active at least once), "alive" (units active in any pass), and the sums "p", "p²", "σ'²" over entries, "x²"
            over tokens (‖x_t‖²), "a²" (‖a_t‖², a_t the input of the value layer).

    Returns:
        density, derivative_density, union_density, dead_units (share of units never active), live_density =
        density / (1 − dead_units), input_norm (mean ‖x_t‖²), activation_norm (per sample: E Σ_t ‖a_t‖²),
        squared_derivative (mean σ'²), squared_pre_activation (mean p²), pre_activation_std, tokens (T, per sample),
        units (d_ff), samples.
    """
    entries = sums["entries"]
    density = ratio(sums["active"], entries)
    alive = ratio(sums["alive"], sums["units"])
    mean, square = ratio(sums["p"], entries), ratio(sums["p²"], entries)
    return {
        "density": density,
        "derivative_density": ratio(sums["differentiable"], entries),
        "union_density": ratio(sums["union"], sums["calls"]),
        "dead_units": 1 - alive,
        "live_density": ratio(density, alive),
        "input_norm": ratio(sums["x²"], sums["tokens"]),
        "activation_norm": ratio(sums["a²"], sums["samples"]),
        "squared_derivative": ratio(sums["σ'²"], entries),
        "squared_pre_activation": square,
        "pre_activation_std": math.sqrt(max(square - mean**2, 0)) if entries else math.nan,
        "tokens": ratio(sums["tokens"], sums["samples"]),
        "units": sums["units"],
        "samples": sums["samples"],
    }


def key_identity(sums: Sums) -> dict[str, float]:
    """Return density = AF_K / (T d_ff C_0) and its factors, of the passes that had a backward pass.

    Args:
        sums: "entries", "active", "samples", and the sums "x²η²" and "x²g²" over entries, "active x²η²" and "active
            x²g²" over the active ones, "marginal x²η²" over those with 0 < |a| ≤ zero.

    Returns:
        augmented_flatness_key (AF_K), coefficient_key (C_0), coefficient_key_authors (the authors' code leaves out
        σ'²: mean over active entries of ‖x_t‖² g², exact where σ' = 1), density_from_flatness (from AF_K less what
        marginal entries add to it, as they count as zero), augmented_flatness_linear (what AF_K would be with σ' = 1
        everywhere: E_sample Σ_t ‖x_t‖² ‖g_t‖²; AF_K over it is free of the scales of x and g).
    """
    coefficient = ratio(sums["active x²η²"], sums["active"])
    return {
        "augmented_flatness_key": ratio(sums["x²η²"], sums["samples"]),
        "augmented_flatness_linear": ratio(sums["x²g²"], sums["samples"]),
        "coefficient_key": coefficient,
        "coefficient_key_authors": ratio(sums["active x²g²"], sums["active"]),
        "density_from_flatness": ratio(sums["x²η²"] - sums["marginal x²η²"], sums["entries"] * coefficient),
    }


def value_identity(sums: Sums) -> dict[str, float]:
    """Return E ‖a‖² = AF_V / C_2 and its factors, of the passes that had a backward pass.

    Args:
        sums: "tokens", "samples", and the sums over tokens "a²" (‖a_t‖²), "z'²" (‖∂L/∂z_t‖²) and "a²z'²".

    Returns:
        augmented_flatness_value (AF_V), coefficient_value (C_2), coefficient_value_authors (their plain mean of
        ‖∂L/∂z_t‖², with which the identity is not exact), activation_norm_from_flatness (per sample).
    """
    flatness = ratio(sums["a²z'²"], sums["samples"])
    coefficient = ratio(sums["a²z'²"], sums["a²"])
    return {
        "augmented_flatness_value": flatness,
        "coefficient_value": coefficient,
        "coefficient_value_authors": ratio(sums["z'²"], sums["tokens"]),
        "activation_norm_from_flatness": ratio(flatness, coefficient),
    }


def gradient_statistics(sums: Sums, thresholds: Iterable[str] = ()) -> dict[str, float]:
    """Return the statistics of activation gradients g and effective gradients η, per sample and free of loss scaling.

    Args:
        sums: "entries", "tokens", "active", "η < 0", "η > 0" (entries), and the sums "g²", "active g²",
            "|η|", "η", "η²" over entries.
        thresholds: names of sums that count entries with |η| below some threshold.

    Returns:
        activation_gradient (E g²), activation_gradient_active (E[g² | active]), activation_gradient_ratio of the two,
        gradient_density (share η ≠ 0), the shares below the thresholds, and per token: effective_gradient_l1 (Σ|η|),
        effective_gradient_l2 (Σ η²), beneficial_units and harmful_units (numbers of η < 0 and η > 0), beneficial_sum
        and harmful_sum (of these η).
    """
    everywhere, active = ratio(sums["g²"], sums["entries"]), ratio(sums["active g²"], sums["active"])
    tokens = sums["tokens"]
    return {
        "activation_gradient": everywhere,
        "activation_gradient_active": active,
        "activation_gradient_ratio": ratio(active, everywhere),
        "gradient_density": ratio(sums["η < 0"] + sums["η > 0"], sums["entries"]),
        **{name: ratio(sums[name], sums["entries"]) for name in thresholds},
        "effective_gradient_l1": ratio(sums["|η|"], tokens),
        "effective_gradient_l2": ratio(sums["η²"], tokens),
        "beneficial_units": ratio(sums["η < 0"], tokens),
        "harmful_units": ratio(sums["η > 0"], tokens),
        "beneficial_sum": ratio((sums["η"] - sums["|η|"]) / 2, tokens),
        "harmful_sum": ratio((sums["η"] + sums["|η|"]) / 2, tokens),
    }


def remaining_multiply_adds(density: float, derivative_density: float) -> tuple[float, float]:
    """Return the shares of an MLP's multiply-adds that a computation which skips zeros has left, forward and backward.

    All of the products below take d · d_ff multiply-adds per token when dense.

        forward:   p = K x      dense: which entries are zero is only known afterwards
                   z = V a      density            →  (1 + density) / 2
        backward:  ∂V = ∂z aᵀ   density: columns of active units
                   ∂a = Vᵀ ∂z   derivative density: needed where σ' ≠ 0 alone
                   ∂x = Kᵀ η    derivative density
                   ∂K = η xᵀ    derivative density  →  (density + 3 · derivative density) / 4

    Args:
        density: share of non-zero activations, in [0, 1] (numbers, arrays or pandas columns alike).
        derivative_density: share of entries with σ'(p) ≠ 0, in [0, 1].
    """
    return (1 + density) / 2, (density + 3 * derivative_density) / 4
