"""What a pass of a model costs, measured: trees of many sizes behind a context of random tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import DynamicCache

from lookahead.cache import opened
from lookahead.cost import KNOTS
from lookahead.curves import Curve, key_of, setting_of
from lookahead.draft import Draft
from lookahead.errors import InvalidArgument, UnsupportedModel
from lookahead.families import require_usable, text_config, vocabulary
from lookahead.script import scripts_of
from lookahead.static.choice import static_of
from lookahead.static.shapes import Counts
from lookahead.static.target import StaticTarget
from lookahead.support import family_of
from lookahead.target import Target
from lookahead.topk import TOP, best_tokens
from lookahead.transfer import fetched

CONTEXT, MOST, ROUNDS = 256, 64, 9


def measure(
    model: Any,
    *,
    rows: int = 1,
    context: int = CONTEXT,
    most: int = MOST,
    rounds: int = ROUNDS,
    say: Callable[[str, float], object] = lambda text, part: None,
) -> Curve:
    """Return what passes over trees of growing sizes cost; of a size, the median over rounds counts.

    In a round all sizes have their turn, in random order: a machine whose speed changes meanwhile does not favour some.
    What the model answers and the state of random generators stay as they are.

    Args:
        model: a causal language model of a served family.
        rows: the batch size.
        context: tokens before the trees; fewer where the model has not so many positions.
        most: nodes below the root of the largest tree; likewise.
        rounds: passes of every size; one more goes before and does not count.
        say: is told what goes on, and what part is done.

    Raises:
        InvalidArgument: a number out of range.
        UnsupportedModel: the model's architecture is not served.

    >>> Curves().replaced(measure(model)).save("curves.json")
    """
    for name, value, least in (("rows", rows, 1), ("context", context, 1), ("most", most, 0), ("rounds", rounds, 1)):
        if type(value) is not int or value < least:
            raise InvalidArgument(f"{name}={value!r}; give a whole number of {least} or more")
    context, sizes = fitting(model.config, context, most)
    with torch.no_grad(), model._optimize_model_for_decode():
        trees = _Trees(model, rows, context, sizes[-1])
        times = _rounds(trees, sizes, rounds, say)
    seconds = _rising(np.median(times, axis=0))
    return Curve(key_of(model), rows, context, tuple(sizes), tuple(seconds.tolist()), setting_of(model))


def fitting(config: Any, context: int, most: int) -> tuple[int, list[int]]:
    """Return how much of `context` fits the positions of a model, and the sizes of trees up to `most` nodes that do."""
    sizes = [int(knot) for knot in KNOTS if knot <= most + 1]
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return context, sizes
    sizes = [size for size in sizes if size < positions]
    return min(context, positions - sizes[-1]), sizes


class _Trees:
    """Passes over trees of random tokens behind a context of random tokens, of which nothing is kept.

    Args:
        rows: the batch size.
        context: tokens of the context.
        most: nodes of the largest tree.
    """

    def __init__(self, model: Any, rows: int, context: int, most: int) -> None:
        require_usable(model, prompt=context, longest=context + most)
        family = family_of(model)
        if family.encoder:
            raise UnsupportedModel(
                f"{type(model).__name__} has an encoder, and calibrate measures decoders alone; leave its curve to be "
                "learnt as it writes"
            )
        tokens = np.random.default_rng(0).integers(vocabulary(model), size=(rows, context + most))
        ids = torch.from_numpy(tokens[:, :context]).to(model.device)
        cache = opened(DynamicCache(config=text_config(model)))
        options = {"use_cache": True, "return_dict": True, "logits_to_keep": 1, **dict(family.inputs)}
        model(input_ids=ids, **{family.cache: cache}, **options)
        self._tokens, self._starts = tokens[:, context:], [0] * rows
        last = torch.full((rows,), context - 1)
        self._target: Target | StaticTarget
        if static_of(model, family, None, invariant=False, compile=False):  # as decoding has them
            self._target = StaticTarget(model, family, cache, None, last, 1, nodes=most, counts=Counts())
        else:
            scripts = scripts_of(model, family, rows, at_once=True)  # and recorded, as it soon has them on a CPU
            self._target = Target(model, family, cache, None, last, room=most, scripts=scripts)

    def seconds(self, size: int) -> float:
        """Return what a pass over `size` nodes takes until its best tokens are on the host, as decoding has them."""
        drafts = [Draft.chain(row[:size].tolist()) for row in self._tokens]
        begin = time.perf_counter()
        run_pass(self._target, drafts, self._starts)
        return time.perf_counter() - begin


def run_pass(target: Target | StaticTarget, drafts: Sequence[Draft], columns: Sequence[int]) -> None:
    """Run a pass as greedy decoding does, until the best tokens of all nodes are on the host."""
    logits = target.forward(drafts, columns)
    if target.best is None:
        best_tokens(logits.flatten(0, 1).float(), TOP)
        return
    tokens, heights = target.best
    target.accept(tokens[..., 0])
    fetched(tokens.to(torch.int32), heights)


def _rounds(
    trees: _Trees, sizes: Sequence[int], rounds: int, say: Callable[[str, float], object]
) -> NDArray[np.float64]:
    """Return [rounds, sizes] seconds; a first round, in which kernels compile and buffers grow, is left out."""
    order, times = np.random.default_rng(0), np.zeros((rounds + 1, len(sizes)))
    for i, row in enumerate(times):
        for done, j in enumerate(order.permutation(len(sizes))):
            part = (i + done / len(sizes)) / len(times)
            say(f"{f'round {i} of {rounds}' if i else 'warming up'}: {sizes[j]} nodes …", part)
            row[j] = trees.seconds(sizes[j])
    return times[1:]


def _rising(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the largest values below `seconds` that never fall: what disturbs a pass only ever slows it down."""
    return np.minimum.accumulate(seconds[::-1])[::-1]
