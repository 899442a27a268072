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


def paper_multipliers_autograd(samples, levels, n_steps=150, learning_rate=0.1):
    """Return the same through torch's autograd and Adam, the way the published program runs it.

    λ lives in one tensor that every step overwrites in place, and the graph is retained, so each
    backward pass walks through all the steps before it: this is where its time goes.
    """
    import torch

    r = torch.tensor(np.asarray(samples).T, dtype=torch.float32)
    c = torch.tensor(np.asarray(levels), dtype=torch.float32)
    columns = list(range(len(c)))
    multipliers = torch.ones(len(c))
    tau = torch.zeros(len(c), requires_grad=True)
    adam = torch.optim.Adam([tau], lr=learning_rate)
    for _ in range(n_steps):
        adam.zero_grad()
        multipliers[columns] = torch.exp(tau)
        if not torch.isfinite(multipliers).all():
            return multipliers.detach().numpy(), False
        log_partition = torch.log(torch.exp((multipliers[:, None] * r).sum(dim=0)).mean())
        (log_partition - torch.dot(multipliers, c)).backward(retain_graph=True)
        adam.step()
    return multipliers.detach().numpy().astype(np.float64), True
