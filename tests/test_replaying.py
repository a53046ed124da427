"""A model that writes recorded texts, for benchmarks: in passes of every kind, and only while it is told to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from replaying import ROOM, Replay

from lookahead import Lookahead
from lookahead.testing import Oracle


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recorded_texts_are_written(family: str) -> None:
    model = tiny(family, dtype="float32")
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    recorded = [10 + (i * i) % 30 for i in range(24)]
    before, kind = model.generate(ids, max_new_tokens=24), type(model)
    replay = Replay(model)
    replay.write([*ids[0].tolist(), *recorded])
    ways: list[dict[str, Any]] = [{}, {"static": True}, {"invariant": True}, {"static": True, "nodes": 0}]
    ways += [{"script": True}, {"script": True, "nodes": 0}]
    for way in ways:
        drafter = None if "nodes" in way else Oracle([recorded], 48, error=0.3)
        la = Lookahead(model, drafter=drafter, **way)
        with replay.on():
            assert model.generate(ids, max_new_tokens=24)[0, 5:].tolist() == recorded
            assert la.generate(ids, max_new_tokens=24)[0, 5:].tolist() == recorded
            if "script" in way:
                assert la.recorded
                assert not any(one.refused for one in la.recorded), la.recorded
        assert torch.equal(la.generate(ids, max_new_tokens=24), before), "what was kept writes on"
    assert type(model) is kind
    with pytest.raises(ValueError, match="there is room"):
        replay.write([1] * (ROOM + 1))
