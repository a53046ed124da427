"""The noise of coming columns of one batch row, as kernels see it; `lookahead.foresight` fills it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lookahead.draft import FloatArray, IntArray

FIRST, SHOWN = 0, 1  # in `state`
DOUBT = 2  # in `state`: how much the model doubts what it picks of late, 0, 1 or 2


class Noise(NamedTuple):
    """What draws the next tokens.

    Entry (state[FIRST] + d) % R is about the token that follows a node of depth d, for d < state[SHOWN].
    """

    blocks: FloatArray  # [R, V] the exponential noise q of R columns
    tokens: IntArray  # [R, K] tokens that it favours: those with the largest usual chance over q
    chances: FloatArray  # [R, K] the usual chance of those
    state: NDArray[np.int64]  # [3] see above
    heat: FloatArray  # [1] one over the temperature


def no_noise() -> Noise:
    """Return the noise of a text that is not sampled, or whose noise is not known ahead."""
    return Noise(
        blocks=np.zeros((0, 0), np.float32),
        tokens=np.zeros((0, 0), np.int32),
        chances=np.zeros((0, 0), np.float32),
        state=np.zeros(3, np.int64),
        heat=np.ones(1, np.float32),
    )
