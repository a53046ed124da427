"""A program that two processes run: a tensor-parallel model writes with lookahead what it writes without, in both."""

from __future__ import annotations

import copy
import sys
from contextlib import ExitStack
from unittest import mock

import torch
from budgets import Clock
from law import CLOCKS
from models import tiny
from torch import distributed
from transformers.distributed import DistributedConfig

from lookahead import Jacobi, Lookahead, LookaheadError, Pool, UnsupportedArgument
from lookahead.request import refuse_clocks, runs_together

UNABLE = 77  # exit status where this machine lets processes not talk to each other
IDS = torch.tensor([[5, 6, 7, 8, 5, 6], [9, 6, 7, 8, 5, 6]])
CALL = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]), "max_new_tokens": 40}


def spread(family: str, **sizes: int) -> object:
    """Return the tiny model of `family` with its weights, or its layers, spread over the processes."""
    model = copy.deepcopy(tiny(family))
    config, _, mesh = type(model).prepare_distribute_model(DistributedConfig(**sizes))
    return type(model).maybe_distribute_model(model, config, mesh)


def refusal(run: object) -> str:
    """Return with which words a call is refused, "" if it is not."""
    try:
        run()  # type: ignore[operator]
    except (UnsupportedArgument, LookaheadError) as error:
        return str(error)
    return ""


def main(rank: int, store: str) -> None:
    try:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        distributed.barrier()
    except RuntimeError as error:
        print(error)
        sys.exit(UNABLE)
    for family in ("llama", "qwen3_moe"):
        model = spread(family, tp_size=2)
        assert runs_together(model)
        assert not runs_together(tiny(family))
        sources = ("prompt", "pool", "recycle", Jacobi(window=5, ngram=4, verify=5, switch="on"))
        for options in ({"nodes": 8}, {"nodes": 8, "sources": sources, "pool": Pool()}, {"nodes": 0}):
            la = Lookahead(model, **options)
            refuse_clocks(model, la.budget, la.drafter)
            for sample in (False, True, False):
                outputs, states = [], []
                for generate in (tiny(family).generate, model.generate, la.generate):  # type: ignore[attr-defined]
                    with ExitStack() as stack:
                        for place in CLOCKS:  # two processes never see the same times
                            stack.enter_context(mock.patch(place, Clock(rank)))
                        torch.manual_seed(3)
                        outputs.append(generate(IDS, do_sample=sample, **CALL).tolist())
                    states.append(torch.get_rng_state())
                assert outputs[0] == outputs[1] == outputs[2], (family, options, sample)
                assert torch.equal(states[1], states[2])
            assert la.last is not None
            assert options["nodes"] == 0 or la.last.tokens_per_pass > 1.2, la.last.tokens_per_pass
            for pool in la.pools:
                pool.close()
    auto, window = Lookahead(model), Lookahead(model, nodes=8, sources=("prompt", "jacobi"))
    assert "nodes='auto'" in refusal(lambda: refuse_clocks(model, auto.budget, auto.drafter))
    assert "Jacobi(switch='on')" in refusal(lambda: refuse_clocks(model, window.budget, window.drafter))
    assert "nodes='auto'" in refusal(lambda: auto.generate(IDS, **CALL))
    assert "Jacobi(switch='on')" in refusal(lambda: model.generate(IDS, custom_generate=window, **CALL))
    refuse_clocks(tiny("llama"), auto.budget, auto.drafter)
    assert "pp_size=2" in refusal(lambda: Lookahead(spread("llama", pp_size=2)).generate(IDS, **CALL))
    assert "FSDP" in refusal(lambda: Lookahead(spread("llama", fsdp_size=2)).generate(IDS, **CALL))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
