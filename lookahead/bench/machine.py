"""Where figures were measured."""

from __future__ import annotations

import datetime
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lookahead

PACKAGES = ("torch", "transformers")


def about(model: Any, name: str, threads: int) -> str:
    """Return model, machine, versions and date in one line of Markdown."""
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    size = f"{millions / 1e3:.2f} B" if millions >= 1000 else f"{millions:.1f} M"
    dtype, where = str(model.dtype).removeprefix("torch."), Path(name).name or name
    versions = [f"lookahead {lookahead.__version__}", *(f"{one} {version(one)}" for one in PACKAGES)]
    parts = [
        f"{where} ({model.config.model_type}, {size} parameters, {dtype})",
        f"{device(model)}, {threads} thread{'s' if threads > 1 else ''}",
        ", ".join([*versions, f"Python {platform.python_version()}"]),
        datetime.date.today().isoformat(),
    ]
    return "; ".join(parts)


def device(model: Any) -> str:
    """Return what a model runs on, as its maker calls it."""
    if model.device.type == "cuda":
        return str(torch.cuda.get_device_name(model.device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
