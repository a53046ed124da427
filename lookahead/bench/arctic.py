"""Arctic Inference's suffix trees as a drafter: its drafts, our verifier."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from lookahead.draft import Draft, IntArray
from lookahead.drafter import Drafter
from lookahead.trace import Step

ARCTIC_DEPTH = 64
"""Depth of Arctic's trees, its default: the tokens of a context that it can match."""

SPEND_ALL = {"max_spec_factor": 32.0, "max_spec_offset": 32.0, "min_token_prob": 0.0}
"""Arctic's best limits for tree drafts: the whole budget is used at any match length, however small the chance."""

AS_SHIPPED = {"max_spec_factor": 1.0, "max_spec_offset": 0.0, "min_token_prob": 0.1}
"""Arctic's default limits: as many tokens as were matched, while they are likely."""


class Arctic(Drafter):
    """Arctic Inference's suffix cache: a local tree of the request, a global one of all responses so far.

    As in its own simulator and in vLLM, a response joins both trees while it is written, a prompt the local one only.
    `pip install --no-deps arctic-inference==0.3.0` builds it; it needs neither a GPU nor vLLM.

    Attributes:
        settings: what a reader of its figures has to know, ready for JSON.

    Raises:
        ImportError: it is not installed.
    """

    settings: dict[str, Any]

    def __init__(self, *, tree: bool, limits: dict[str, float]) -> None:
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self._cache = SuffixDecodingCache(max_tree_depth=ARCTIC_DEPTH)
        self._limits = {**limits, "use_tree_spec": tree}
        self._requests = itertools.count()
        self.settings = {**self._limits, "max_tree_depth": ARCTIC_DEPTH}

    def start(self, context: IntArray) -> Drafter:
        request = next(self._requests)
        self._cache.start_request(request, own(context))
        return ArcticRow(self._cache, request, self._limits, len(context))

    def propose(self, context: IntArray, budget: int) -> Draft:
        raise NotImplementedError("the suffix cache drafts for started requests only; call start()")

    def finish(self, text: IntArray) -> None:
        """Hear that the request `text` ([L] int32, prompt and output) has ended."""
        for request in list(self._cache.active_requests):
            self._cache.stop_request(request)


class ArcticRow(Drafter):
    """One active request of a suffix cache, which knows the first `known` tokens of the context."""

    random = False

    def __init__(self, cache: Any, request: int, limits: dict[str, Any], known: int) -> None:
        self._cache, self._request, self._limits, self._known = cache, request, limits, known

    def propose(self, context: IntArray, budget: int) -> Draft:
        self._add(context[self._known :])  # the first token, which came with the prompt
        found = self._cache.speculate(
            self._request, own(context[-ARCTIC_DEPTH:]), max_spec_tokens=budget, **self._limits
        )
        return Draft(
            np.array([context[-1], *found.token_ids], np.int32),
            np.array([-1, *(parent + 1 for parent in found.parents)], np.int32),
        )

    def observe(self, step: Step) -> None:
        self._add(step.tokens.astype(np.int32))

    def _add(self, tokens: IntArray) -> None:
        self._known += len(tokens)
        if len(tokens):
            self._cache.add_active_response(self._request, own(tokens))


def own(tokens: IntArray) -> IntArray:
    """Return a fresh array: the suffix cache takes neither read-only nor strided ones."""
    return np.array(tokens, np.int32)
