"""What the tests of the pool have in common: naive twins of its index, a look into its runs, processes to be killed."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from lookahead.draft import IntArray
from lookahead.pool.index import FREQUENT, LISTED, Run, build
from lookahead.pool.pool import Pool

DEPTH = 32
Document = tuple[int, ...]

# Small alphabets repeat themselves; the large one needs more than 16 bits.
ALPHABETS = ((0, 1), (0, 1, 2, 3), (0, 65_534, 65_535, 65_536, 70_000), (7,))


def documents_of(tokens: Sequence[int], max_size: int = 45) -> Any:
    """Documents, some of them repeated, empty or made of a piece that comes again and again."""
    plain = st.lists(st.sampled_from(tokens), max_size=max_size)
    periodic = st.builds(
        lambda piece, times, rest: piece * times + rest,
        st.lists(st.sampled_from(tokens), min_size=1, max_size=3),
        st.integers(1, max_size),
        st.lists(st.sampled_from(tokens), max_size=2),
    )
    return st.one_of(plain, periodic.map(lambda document: document[: 2 * max_size])).map(tuple)


collections = st.sampled_from(ALPHABETS).flatmap(
    lambda tokens: st.lists(documents_of(tokens), max_size=6).flatmap(
        lambda documents: (
            st.lists(st.sampled_from(documents), max_size=8).map(lambda more: documents + more)
            if documents
            else st.just(documents)
        )
    )
)


def array(tokens: Sequence[int]) -> IntArray:
    return np.array(tokens, np.int32)


def run_of(documents: Sequence[Document], digests: Sequence[int] | None = None) -> Run:
    return build([array(document) for document in documents], digests)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two sequences have in common at their beginning, at most 32."""
    n = 0
    while n < min(len(a), len(b), DEPTH) and a[n] == b[n]:
        n += 1
    return n


class Twin:
    """Documents, every context written out.

    Attributes:
        rows: the context of every token and of every document's end, newest token first, and the symbol that followed
            (token + 1, 0: the end), sorted by context as far as 32 tokens, then by place.
    """

    def __init__(self, documents: Sequence[Sequence[int]]) -> None:
        self.documents = [tuple(document) for document in documents]
        places = [(d, i) for d, document in enumerate(self.documents) for i in range(len(document) + 1)]
        self.places = sorted(places, key=lambda place: (self.context(*place), place))
        self.rows = [(self.context(*place), self.symbol(*place)) for place in self.places]

    def context(self, d: int, i: int) -> Document:
        return self.documents[d][max(0, i - DEPTH) : i][::-1]

    def symbol(self, d: int, i: int) -> int:
        return self.documents[d][i] + 1 if i < len(self.documents[d]) else 0

    def lcp(self) -> list[int]:
        contexts = [context for context, _ in self.rows]
        return [0, *(common(a, b) for a, b in itertools.pairwise(contexts))][: len(contexts)]

    def back(self) -> list[int]:
        row_of = {place: row for row, place in enumerate(self.places)}
        return [row_of[d, i - 1] if i > 0 else 0 for d, i in self.places]

    def ends(self) -> list[int]:
        row_of = {place: row for row, place in enumerate(self.places)}
        return [row_of[d, len(document)] for d, document in enumerate(self.documents)]

    def starts(self) -> list[int]:
        newest = [context[0] + 1 if context else 0 for context, _ in self.rows]
        symbols = max((symbol for _, symbol in self.rows), default=0) + 1
        return np.searchsorted(newest, np.arange(symbols + 1)).tolist()

    def listed(self) -> dict[tuple[int, int], tuple[int, int, list[tuple[int, int]]]]:
        """Frequent contexts (newest symbol, the one before or 0): rows, different successors, the commonest."""
        seen: dict[Document, Counter[int]] = {}
        for context, symbol in self.rows:
            for length in (1, 2):
                if len(context) >= length:
                    seen.setdefault(context[:length], Counter())[symbol] += 1
        least = FREQUENT
        while sum(counts.total() > least for counts in seen.values()) > len(self.rows) // 160:
            least *= 2
        return {
            (context[0] + 1, context[1] + 1 if len(context) > 1 else 0): (
                counts.total(),
                len(counts),
                sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:LISTED],
            )
            for context, counts in seen.items()
            if counts.total() > least
        }

    def longest(self, suffix: Sequence[int]) -> int:
        """The longest match of a suffix, newest first."""
        return max((common(context, suffix) for context, _ in self.rows), default=0)

    def after(self, suffix: Sequence[int], length: int) -> list[int]:
        """The symbols that followed the newest `length` tokens of a suffix."""
        if length > min(len(suffix), DEPTH):
            return []
        return [symbol for context, symbol in self.rows if common(context, suffix) >= length]

    def successors(self, context: Sequence[int], length: int | None = None) -> Counter[int]:
        suffix = list(context)[::-1]
        length = self.longest(suffix) if length is None else length
        return Counter(symbol - 1 for symbol in self.after(suffix, length) if symbol)


def decoded(run: Run) -> list[Document]:
    """The documents of a run, read off its rows one by one."""
    documents = []
    symbols = run.low.astype(np.int64)
    if len(run.high):
        symbols |= run.high.astype(np.int64) << 16
    for end, length in zip(run.ends, run.lengths, strict=True):
        row, document = int(end), []
        assert symbols[row] == 0
        for _ in range(int(length) - 1):
            row = int(run.back[row])
            document.append(int(symbols[row]) - 1)
        documents.append(tuple(document[::-1]))
    return documents


def held(pool: Pool) -> list[Document]:
    """The documents of a pool, oldest first."""
    return [document for run in pool.snapshot().runs for document in decoded(run)]


def tokens_in(documents: Sequence[Sequence[int]]) -> int:
    return sum(map(len, documents))


def assert_same_runs(a: Run, b: Run) -> None:
    for name, one, other in zip(Run._fields, a, b, strict=True):
        assert one.dtype == other.dtype, name
        np.testing.assert_array_equal(one, other, err_msg=name)


def answers(pool: Pool, contexts: Sequence[Sequence[int]]) -> list[Any]:
    return [
        (pool.longest_match(context), pool.successors(context), pool.successors(context, 1)) for context in contexts
    ]


def die_like_a_process(pool: Pool) -> None:
    """Leave a pool as a killed process does between two steps of its writing thread: nothing flushed, the lock free."""
    pool._shelf._worker.is_alive() and pool._shelf._worker.join()
    assert pool._store is not None
    pool._store.close()
    pool._shelf._closed = True


@contextlib.contextmanager
def forked(child: Callable[[int], None]) -> Iterator[tuple[int, int]]:
    """Run `child` with the writing end of a pipe in a process of its own; yield its id and the reading end."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which the child never uses
        process = os.fork()
    if process == 0:
        status = 1
        try:
            os.close(reading)
            child(writing)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    try:
        yield process, reading
    finally:
        os.close(reading)
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(process, os.WNOHANG) == (0, 0):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL


def run_apart(act: Callable[[], None], seconds: int = 60) -> int:
    """Run `act` in a process of its own; return 0, 1 where it raised, or less than 0: the signal that ended it."""

    def child(_pipe: int) -> None:
        signal.alarm(seconds)
        act()

    with forked(child) as (process, _):
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
