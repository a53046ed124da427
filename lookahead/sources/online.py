"""Logistic regression that learns as it goes, for the mixer and for the race behind it."""

from __future__ import annotations

import numpy as np

from lookahead.sources.kernels import inner

_WIDEST = np.float32(8.0)  # log-odds
_SLOWEST = np.float32(5000.0)


@inner
def logistic(z):  # type: ignore[no-untyped-def]
    """Return the chance of log-odds `z`; far enough out that the error there moves nothing, it is cut."""
    z = _WIDEST if z > _WIDEST else -_WIDEST if z < -_WIDEST else z
    return np.float32(1.0) / (np.float32(1.0) + np.exp(-z))


@inner
def adapt(w, energy, s, i, gradient, rate):  # type: ignore[no-untyped-def]
    """Move weight i of set s by its gradient (Duchi et al. 2011, Adagrad, whose rate ends where it is slow)."""
    if energy[s, i] < _SLOWEST:
        energy[s, i] += gradient * gradient
    w[s, i] += rate * gradient / np.sqrt(energy[s, i])


@inner
def adapt_all(w, energy, error, x, rate):  # type: ignore[no-untyped-def]
    """Do what `adapt` does to all weights of one set, by gradients of error times x.

    Without a branch, so that it is compiled to vector instructions; a gradient of 0 moves nothing.
    """
    for i in range(x.shape[0]):
        gradient = error * x[i]
        energy[i] += gradient * gradient if energy[i] < _SLOWEST else np.float32(0.0)
        w[i] += rate * gradient / np.sqrt(energy[i])
