"""Numbers between host and device, in as few waits as there can be."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def sent(values: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on `device`; a GPU need not have done what it was told before."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def fetched(*tensors: Tensor) -> list[NDArray[Any]]:
    """Return tensors of 32 bits a number as arrays, in one transfer, which waits until they are known."""
    whole = torch.cat([one.contiguous().view(torch.int32).flatten() for one in tensors]).cpu().numpy()
    parts = np.split(whole, np.cumsum([one.numel() for one in tensors])[:-1])
    kinds = [np.float32 if one.is_floating_point() else np.int32 for one in tensors]
    return [part.view(kind).reshape(one.shape) for part, kind, one in zip(parts, kinds, tensors, strict=True)]
