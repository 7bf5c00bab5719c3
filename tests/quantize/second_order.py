"""Independent numpy versions of the sweep, in float64, and inputs to try it on."""

import numpy as np


def inputs(n, rows=None, seed=0):
    """Correlated inputs with a few that are far larger than the rest."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows or 4 * n, n)) @ (np.eye(n) + 0.3 * rng.standard_normal((n, n)))
    return (x * np.exp(0.7 * rng.standard_normal(n))).astype(np.float32)


def moment(x):
    x = np.asarray(x, np.float64)
    return x.T @ x / len(x)


def damped(h, damping):
    h = h.copy()
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    return h + damping * np.mean(np.diag(h)) * np.eye(len(h))


def obq(w, h, damping, quantize, order=None):
    """Optimal brain quantization without a triangular factor: after each input, the others move to their optimum.

    Input j is rounded; the remaining weights `F` change by `-(w_j - q_j) / [H_F^-1]_jj * [H_F^-1]_{:, j}`, with the
    inverse of the Hessian of the inputs not yet rounded, taken anew each time (GPTQ, section 3.1, equation 2).
    Returns the rounded weights and the loss of each output, `sum (w_j - q_j)^2 / [H_F^-1]_jj`.
    """
    n, out = w.shape
    h = damped(h, damping)
    current = w.astype(np.float64).copy()
    current[np.diag(h) == 0] = 0
    done, loss = np.zeros((n, out)), np.zeros(out)
    left = list(range(n)) if order is None else list(order)
    while left:
        j = left[0]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        done[j] = quantize(j, current[j], current)
        error = current[j] - done[j]
        loss += error**2 / inverse[0, 0]
        current[left] -= np.outer(inverse[:, 0] / inverse[0, 0], error)
        left = left[1:]
    return done, loss


def layer_error(w, q, h):
    """`E |x (W - Q)|^2`."""
    d = np.asarray(w, np.float64) - np.asarray(q, np.float64)
    return float(np.trace(d.T @ h @ d))
