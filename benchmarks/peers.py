"""Drafters of other projects, each behind `lookahead.Drafter`, so that one replay drives them and ours alike.

    arctic_tree_global     Arctic Inference's suffix cache, local tree and global cache, tree drafts, all nodes spent
    arctic_linear_global   the same with linear drafts and the limits that it comes with
    vllm_ngram             vLLM's n-gram rule, n from 2 to 5, 8 tokens
    prompt_lookup          transformers' prompt lookup, 10 tokens

Arctic's cache is a C++ extension that needs neither a GPU nor vLLM: `pip install --no-deps arctic-inference==0.3.0`. A
peer that is not installed raises ImportError when it is made; the rule of vLLM has a twin here.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from lookahead.bench.arctic import ARCTIC_DEPTH, AS_SHIPPED, SPEND_ALL, Arctic, own
from lookahead.draft import Draft, IntArray
from lookahead.drafter import Drafter


class Contender(Drafter):
    """A drafter that is told when a request has ended, and says how it is set.

    Attributes:
        settings: what a reader of its figures has to know, ready for JSON.
    """

    settings: dict[str, Any]

    def finish(self, text: IntArray) -> None:
        """Hear that the request `text` ([L] int32, prompt and output) has ended; called once a request."""


class VllmNgram(Contender):
    """vLLM's n-gram proposer: what followed the first occurrence of the longest n-gram that ends the context.

    Calls vLLM's own function where vLLM imports, else `longest_ngram`; `settings` says which.
    """

    def __init__(self, *, least: int = 2, most: int = 5, tokens: int = 8) -> None:
        self._least, self._most, self._tokens = least, most, tokens
        self._rule, origin = _vllm_rule()
        self.settings = {"n": [least, most], "tokens": tokens, "rule": origin}

    def propose(self, context: IntArray, budget: int) -> Draft:
        guess = self._rule(context, self._least, self._most, sys.maxsize, self._tokens)
        return Draft.chain([int(context[-1]), *guess[:budget].tolist()])


class PromptLookup(Contender):
    """The candidate generator of transformers' prompt lookup, with its default n-grams (at most 2 tokens)."""

    def __init__(self, *, tokens: int = 10) -> None:
        import torch
        from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

        self._tensor = torch.from_numpy
        self._generator = PromptLookupCandidateGenerator(num_output_tokens=tokens, max_length=sys.maxsize)
        self.settings = {"max_matching_ngram_size": self._generator.max_matching_ngram_size, "tokens": tokens}

    def propose(self, context: IntArray, budget: int) -> Draft:
        candidates, _ = self._generator.get_candidates(self._tensor(context.astype(np.int64))[None])
        return Draft.chain(candidates[0, len(context) - 1 :][: budget + 1].tolist())


class ArcticContender(Arctic, Contender):
    """Arctic Inference's suffix cache."""


PEERS: dict[str, Callable[[], Contender]] = {
    "arctic_tree_global": lambda: ArcticContender(tree=True, limits=SPEND_ALL),
    "arctic_linear_global": lambda: ArcticContender(tree=False, limits=AS_SHIPPED),
    "vllm_ngram": VllmNgram,
    "prompt_lookup": PromptLookup,
}
"""How to make each peer; raises ImportError where it is not installed."""


@njit(cache=True)
def longest_ngram(context, least, most, max_length, tokens):  # type: ignore[no-untyped-def]
    """Return at most `tokens` tokens that followed the earlier n-gram which vLLM's proposer picks; none without one.

    A twin of vLLM's rule, written from what the rule says and sharing no code with it: among the earlier occurrences of
    the last n tokens, overlapping ones included, take the largest n within [least, most], then the first occurrence.
    """
    size = context.shape[0]
    longest, after = least - 1, size
    for end in range(size - 1):
        n = 0
        while n < most and n <= end and context[end - n] == context[size - 1 - n]:
            n += 1
        if n > longest:
            longest, after = n, end + 1
    return context[after : min(after + min(tokens, max_length - size), size)]


def arctic_rates(documents: list[IntArray], queries: list[IntArray]) -> dict[str, float]:
    """Return what Arctic's global suffix tree costs: to insert `documents`, to hold them, and to ask about `queries`.

    Inserting is timed on the global tree alone; through the cache a response goes into the local tree as well. Asking
    is the cache's own `speculate` for a request without a prompt: a tree of up to 32 tokens, under the limits that
    draft best and under those it comes with. Times are of this thread on the CPU. Memory is what the process grew by:
    call it in a fresh process, since memory that was freed before is used again unseen. Linux only.

    Args:
        documents: [L] int32 each; one sequence of the tree each.
        queries: [L] int32 each, a context to continue; its last 64 tokens count.

    Returns:
        `tokens`, `insert_tokens_per_s`, `bytes_a_token`; `speculate_p50_us` and `speculate_p99_us` under the limits
        `SPEND_ALL`, `as_shipped_p50_us` and `as_shipped_p99_us` under `AS_SHIPPED`.

    Raises:
        ImportError: Arctic Inference is not installed.
    """
    from arctic_inference.suffix_decoding import SuffixDecodingCache

    cache = SuffixDecodingCache(max_tree_depth=ARCTIC_DEPTH)
    owned = [own(document) for document in documents]
    tokens = sum(len(document) for document in owned)
    gc.collect()
    resident, begin = _resident_bytes(), time.thread_time_ns()
    for i, document in enumerate(owned):
        cache._global_tree.extend_ndarray(i, document)
    seconds = (time.thread_time_ns() - begin) / 1e9
    rates = {
        "tokens": tokens,
        "insert_tokens_per_s": tokens / seconds,
        "bytes_a_token": (_resident_bytes() - resident) / tokens,
    }
    cache.start_request("ask", np.zeros(0, np.int32))
    for name, limits in (("speculate", SPEND_ALL), ("as_shipped", AS_SHIPPED)):
        micros = [_ask_micros(cache, query, limits) for query in queries]
        rates |= {f"{name}_p{share}_us": float(np.percentile(micros, share)) for share in (50, 99)}
    return rates


def _ask_micros(cache: Any, query: IntArray, limits: dict[str, float]) -> float:
    context = own(query[-ARCTIC_DEPTH:])
    begin = time.thread_time_ns()
    cache.speculate("ask", context, max_spec_tokens=32, use_tree_spec=True, **limits)
    return (time.thread_time_ns() - begin) / 1e3


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _vllm_rule() -> tuple[Callable[..., IntArray], str]:
    """Return what drafts, called as (context, least n, most n, longest context, tokens), and where it comes from."""
    try:
        import vllm
        from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens as rule
    except Exception as error:  # vLLM that is there but does not fit the machine raises more than ImportError
        return longest_ngram, f"our twin of vLLM's rule ({type(error).__name__}: {error})"
    return rule, f"vllm {vllm.__version__}"
