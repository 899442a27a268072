"""The procedure of the MAP paper, as published, for comparison.

Wang et al., ICLR 2025, arXiv 2410.19198, Algorithm 1 and problem (7): the pooled dual
λ·c − log mean exp(λ·r), maximised over τ = log λ by 150 Adam steps of 0.1 from λ = 1 in single
precision; a palette is called infeasible when λ is no longer finite.
"""

import numpy as np


def paper_multipliers(samples, levels, n_steps=150, learning_rate=0.1):
    """Return the multipliers, (n_values,), and whether the procedure calls the palette feasible.

    samples: (n_samples, n_values); levels: (n_values,).
    """
    r = np.asarray(samples, dtype=np.float32)
    c = np.asarray(levels, dtype=np.float32)
    tau = np.zeros_like(c)
    mean, square = np.zeros_like(c), np.zeros_like(c)
    multipliers = np.exp(tau)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for step in range(1, n_steps + 1):
            multipliers = np.exp(tau)
            if not np.isfinite(multipliers).all():
                return multipliers, False
            weights = np.exp(r @ multipliers)
            weights /= weights.sum(dtype=np.float32)
            gradient = -(c - weights @ r) * multipliers
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            ahead = mean / (1 - 0.9**step)
            tau = tau - learning_rate * ahead / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
            tau = tau.astype(np.float32)
    return multipliers.astype(np.float64), True
