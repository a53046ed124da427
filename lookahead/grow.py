"""The grower: one token tree a step, grown best first from what all sources know."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable
from copy import copy
from functools import partial
from typing import Any

import numpy as np

from lookahead.draft import Draft, FloatArray, IntArray
from lookahead.drafter import Drafter
from lookahead.errors import InvalidArgument
from lookahead.grammar.matcher import Matcher
from lookahead.grammar.values import Chain, KeyValues, chains
from lookahead.pool.pool import Pool, combined
from lookahead.sources.ahead import look_ahead
from lookahead.sources.codes import NAMES
from lookahead.sources.evidence import GUESTS, add_guest
from lookahead.sources.growth import Scratch, ask_again, begin, empty_scratch, grow, learn_at, learn_from, step
from lookahead.sources.guide import guide
from lookahead.sources.jacobi import Jacobi, empty_ngrams, no_ngrams
from lookahead.sources.kernels import Records
from lookahead.sources.mixer import Weights, fresh_weights, restore, save
from lookahead.sources.nodes import find_nodes
from lookahead.sources.noise import Noise, no_noise
from lookahead.sources.paid import Paid, Timing
from lookahead.sources.pool import Pooled, Reader, no_pool, pooled
from lookahead.sources.prompt import REACH, Index, Prompt, no_index
from lookahead.sources.recycle import Recycled, empty_tables, no_tables, remember
from lookahead.sources.source import Source
from lookahead.sources.tree import CURSOR, NODES, empty_tree
from lookahead.sources.window import Window
from lookahead.trace import Step

SOURCES = NAMES
"""Names of the codes in `Draft.source`; the code of the i-th `Source` object is `len(SOURCES) + i`."""

ENTER = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)

_NONE = np.zeros(0, np.int32)
_SEARCHED = 1 << 13  # tokens of a prompt in which the values of keys are looked for, its last ones
_LARGEST_TOKEN = int(np.iinfo(np.int32).max)


class Grower(Drafter):
    """Grows one tree a step from all sources, always at the node that is likeliest to be accepted.

    What it learns (the weights of the evidence, the recycled logits) outlives a request and is shared by all rows. It
    starts from what the first of the pools keeps; see `keep_learnt`.

    Args:
        sources: whom to ask: "prompt" (n-grams of the row's own context), "pool" (n-grams of `pools`), "recycle" (the
            model's own logits, remembered), "jacobi" or a `Jacobi` (n-grams of a window of guesses that runs beside
            the draft), and up to four `Source` objects.
        pools: asked together; what they hold when a request starts is what it drafts from.
        vocab_size: tokens at or above it are never proposed; None: no limit known.
        min_chance: a node that is accepted less often than this is not worth running.

    Raises:
        InvalidArgument: an unknown source, too many of them, something that is no pool, or a chance outside [0, 1].
    """

    def __init__(
        self,
        *,
        sources: Iterable[str | Jacobi | Source] = ("prompt", "pool", "recycle"),
        pools: Iterable[Pool] = (),
        vocab_size: int | None = None,
        min_chance: float = 0.02,
    ) -> None:
        self.sources = (sources,) if isinstance(sources, str | Jacobi) else tuple(sources)
        self.pools = tuple(pools)
        _check(self.sources, self.pools, vocab_size, min_chance)
        self.vocab_size = vocab_size
        self.min_chance = float(min_chance)
        self.weights: Weights = fresh_weights()
        self.values = KeyValues()
        windows = [Jacobi() if source == "jacobi" else source for source in self.sources]
        self.jacobi = next((one for one in windows if isinstance(one, Jacobi)), None)
        auto = self.jacobi is not None and self.jacobi.switch == "auto" and len(self.sources) > 1
        self.paid = Paid(["pool", "grammar", *(["jacobi"] if auto else [])], resting=["jacobi"])
        self.pool_timing = Timing()
        self.recycled: Recycled = empty_tables(vocab_size) if "recycle" in self.sources else no_tables()
        calibration = next((pool.calibration for pool in self.pools if pool.calibration), None)
        if calibration is not None:
            restore(self.weights, calibration)

    @property
    def probes(self) -> int:  # type: ignore[override]
        """Rows that the window may add to a pass."""
        return 0 if self.jacobi is None else self.jacobi.probes

    @property
    def window_runs(self) -> bool:
        """Whether the window of Jacobi lookahead runs in the next pass."""
        return self.jacobi is not None and self.paid.runs("jacobi")

    def beside(self, pools: Iterable[Pool]) -> Grower:
        """Return a grower that asks `pools` too, before its own, and shares with this one all that is learnt."""
        other = copy(self)
        other.sources = self.sources if "pool" in self.sources else (*self.sources, "pool")
        other.pools = (*pools, *self.pools)
        _check(other.sources, other.pools, self.vocab_size, self.min_chance)
        return other

    def learn_values(self, matcher: Matcher, tokens: IntArray) -> None:
        """Take in an output that followed a grammar: the values of its keys."""
        if matcher.keys:
            self.values.add(matcher.vocabulary.decode(tokens.tolist()).decode("utf-8", "replace"))

    def keep_learnt(self) -> None:
        """Let the pools write, with what is added to them, what is learnt from here on."""
        for pool in self.pools:
            pool.keep_calibration(partial(save, self.weights))

    def start(self, context: IntArray) -> Drafter:
        return Row(self, context)

    def propose(self, context: IntArray, budget: int) -> Draft:
        return Row(self, context).propose(context, budget)


class Row(Drafter):
    """The grower at work on one batch row."""

    def __init__(self, grower: Grower, context: IntArray) -> None:
        self._grower, self._start = grower, np.array(context[-_SEARCHED:], np.int32)
        self._prompt = Prompt(context) if "prompt" in grower.sources else None
        self._no_index = no_index()
        # Held here: a pool that merges meanwhile leaves this row its runs.
        self._snapshot = combined(grower.pools if "pool" in grower.sources else ())
        self._pooled = self._no_pool = no_pool()
        self._reader = Reader()
        self._guests = [source for source in grower.sources if isinstance(source, Source)]
        self.random = bool(self._guests)
        self._said: list[list[tuple[IntArray, FloatArray]]] = []  # by the guests, of every node
        self._new = self._read = self._tail = _NONE
        self._tree = empty_tree(0)
        self._matcher: Matcher | None = None
        self._values: list[Chain] = []
        options = grower.jacobi
        self._ngrams = no_ngrams() if options is None else empty_ngrams(options)
        self._window = None if options is None else Window(options, self._ngrams)
        self.probes = grower.probes
        self._noise = no_noise()
        self._grown_s = self._window_s = self._mask_s = 0.0
        self._scratch = empty_scratch(ngrams=self._ngrams)
        self._guide = self._scratch.evidence.guide
        self._free_scratch = self._scratch
        self._failure: BaseException | None = None
        self._ran: dict[str, bool] = {}
        self._prices: dict[str, float] = {}
        self.costs = self._prices
        self._entered = (0, 0.0)  # states of the grammar that the last draft entered, and the seconds of it
        self._read_to = len(context)  # of the context, what the last step or draft has seen

    def obey(self, matcher: Matcher) -> bool:
        self._matcher, self._tree = matcher, empty_tree(0)
        self._values = chains(matcher.keys, matcher.vocabulary, self._start, self._grower.values)
        self._enters = ENTER(self._enter)  # held here: the kernels know its address only
        return True

    def foresee(self, noise: Noise) -> bool:
        self._noise = noise
        self._scratch = empty_scratch(self._guide, self._ngrams, noise)
        self._free_scratch = empty_scratch(None, self._ngrams, noise)
        return len(noise.blocks) > 0

    def propose(self, context: IntArray, budget: int) -> Draft:
        if len(context) == 0:
            raise InvalidArgument("propose() needs a context of at least one token, the draft's node 0")
        self._make_room(budget)
        if len(context) != self._read_to:  # passes went by without a draft
            self._tree.used[CURSOR:] = -1, 0
            if self._window is not None:
                self._window.restart()
        self._read_to = len(context)
        started = time.perf_counter()
        paid, self._entered = self._grower.paid, (0, 0.0)
        self._ran = {name: paid.runs(name) for name in paid.switches}
        self._new = _NONE if self._prompt is None else self._prompt.fresh(context)
        self._read = self._reader.fresh(context, self._asked_pool)
        self._tail = np.array(context[-REACH:], np.int32)
        self._ngrams.root[0] = len(context) - 1
        if self._matcher is not None:
            self._matcher.reserve(2 * budget + 16)
            self._look_at(self._matcher)
        if self._guests:
            self._grow_with_guests(context)
        else:
            grow(self._index, self._new, self._asked_pool, self._read, *self._knowledge, *self._limits)
        self._raise_failure()
        draft = _drafted(self._tree.nodes[: self._tree.used[NODES]])
        self._grown_s = time.perf_counter() - started
        return draft if self._window is None else self._with_window(draft, self._window)

    def _make_room(self, budget: int) -> None:
        if len(self._tree.nodes) != budget + 1:
            used, self._tree = self._tree.used, empty_tree(budget)
            self._tree.used[CURSOR:] = used[CURSOR:]
            self._pooled = pooled(self._snapshot.views, budget + 1)
            self._reader = Reader()

    def observe(self, step: Step) -> None:
        draft, recycled = step.draft, self._grower.recycled
        nodes = np.empty(len(draft), np.int32)
        grown = self._tree.nodes[: self._tree.used[NODES]]
        find_nodes(draft.tokens, draft.parents, grown["token"], grown["parent"], nodes)
        if self._matcher is not None:
            self._look_at(self._matcher)
        if self._guests:
            self._learn_with_guests(step, nodes)
        else:
            learn_from(self._index, self._asked_pool, *self._knowledge, step.path, step.tokens, nodes)
        if len(recycled.key) and len(step.top_tokens) == len(draft):
            before = int(self._tail[-2]) if len(self._tail) > 1 else -1
            remember(recycled, before, draft.tokens, draft.parents, step.top_tokens, step.top_logits)
        if self._window is not None:
            self._window.observe(step, self._tree, self._guide.masks)
        self._raise_failure()
        for guest in self._guests:
            guest.observe(step)
        self._read_to += len(step.tokens)
        self._account(step)

    def _account(self, step: Step) -> None:
        """Tell what the sources that cost time took, and what they brought."""
        if not step.frugal and self._window is None:
            return
        grower, nodes = self._grower, int(self._tree.used[NODES]) - 1  # all that were asked about, cut or not
        prices = self._prices
        prices.clear()
        if len(self._snapshot.views):
            grower.pool_timing.add(self._grown_s - self._entered[1], nodes, with_it=self._ran["pool"])
            prices["pool"] = grower.pool_timing.price(nodes)
        if self._matcher is not None:
            entered, seconds = self._entered
            # Masks of accepted nodes would have been computed without drafts, too.
            prices["grammar"] = seconds * max(1.0 - len(step.path) / entered, 0.0) if entered else self._mask_s * nodes
            self._mask_s = seconds / entered if entered else self._mask_s
        if self._window is not None and step.token_s > 0.0:
            probes = int(np.count_nonzero(step.draft.probe)) or self.probes
            prices["jacobi"] = probes * step.row_s / step.drafting + self._window_s
        grower.paid.observe(step, prices, self._ran)
        for name in [name for name, ran in self._ran.items() if not ran]:
            prices.pop(name, None)

    def _with_window(self, draft: Draft, window: Window) -> Draft:
        if self._grower.jacobi is None or not self._ran.get("jacobi", True):
            window.restart()
            return draft
        begin = time.perf_counter()
        ahead = np.zeros(window.reach, np.int32)
        if window.wants_guesses:
            look_ahead(self._tree, self._index, self._grower.recycled, self._tail, self._start, ahead)
        laid = window.lay(draft, ahead, self._tree, self._guide.masks, self._limits[1])
        self._window_s = time.perf_counter() - begin
        return laid

    def _look_at(self, matcher: Matcher) -> None:
        """Let the kernels see the matcher's masks, which it may have moved."""
        if self._guide.masks is not matcher.masks:
            address = ctypes.cast(self._enters, ctypes.c_void_p).value or 0
            self._guide = guide(
                matcher.masks, matcher.vocabulary.spelling, matcher.keys, self._values, matcher.ends, address
            )
            self._scratch = empty_scratch(self._guide, self._ngrams, self._noise)

    def _enter(self, state: int, token: int) -> int:
        """Return the matcher's state after one more token, for the kernels; no exception may leave it."""
        begin = time.perf_counter()
        try:
            assert self._matcher is not None
            if state < 0:
                return self._matcher.root if self._matcher.enter_at(self._matcher.root) else -1
            return self._matcher.enter(state, token)
        except BaseException as error:
            self._failure = error
            return -1
        finally:
            entered, seconds = self._entered
            self._entered = entered + 1, seconds + time.perf_counter() - begin

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    @property
    def _index(self) -> Index:
        return self._no_index if self._prompt is None else self._prompt.index

    @property
    def _asked_pool(self) -> Pooled:
        return self._pooled if self._ran.get("pool", True) else self._no_pool

    @property
    def _knowledge(self) -> tuple[Any, ...]:
        return self._grower.recycled, self._grower.weights, self._tail, self._tree, self._asked_scratch

    @property
    def _asked_scratch(self) -> Scratch:
        return self._scratch if self._ran.get("grammar", True) else self._free_scratch

    @property
    def _limits(self) -> tuple[FloatArray, int]:
        vocab_size, least = self._grower.vocab_size, np.float32(self._grower.min_chance)
        if self.floors is not None and len(self.floors) == len(self._tree.nodes):
            floors = np.maximum(self.floors, least)
        else:
            floors = np.full(len(self._tree.nodes), least, np.float32)
            if self.floors is not None:
                np.maximum(floors[: len(self.floors)], self.floors, out=floors[: len(self.floors)])
        return floors, _LARGEST_TOKEN if vocab_size is None else vocab_size

    def _grow_with_guests(self, context: IntArray) -> None:
        """Do what `grow` does, and let Python objects speak at every node."""
        begin(self._index, self._new, self._asked_pool, self._read, *self._knowledge)
        self._said, nodes = [], self._tree.nodes
        cursors = [[guest.start(context) for guest in self._guests]]
        node = 0
        while node >= 0:
            said = [guest.successors(cursor) for guest, cursor in zip(self._guests, cursors[node], strict=True)]
            self._said.append([(np.asarray(t, np.int32), np.asarray(c, np.float32)) for t, c in said])
            self._tell_guests(node)
            node = step(self._index, self._asked_pool, *self._knowledge, node, *self._limits)
            if node > 0:
                above, token = cursors[nodes["parent"][node]], int(nodes["token"][node])
                cursors.append([g.extend(c, token) for g, c in zip(self._guests, above, strict=True)])

    def _tell_guests(self, node: int) -> None:
        for i, (tokens, chances) in enumerate(self._said[node]):
            add_guest(self._asked_scratch.evidence, i, tokens, chances)

    def _learn_with_guests(self, step: Step, nodes: IntArray) -> None:
        """Do what `learn_from` does, with what the Python objects said."""
        for at, token in zip(step.path, step.tokens, strict=False):
            node = int(nodes[at])
            if 0 <= node < len(self._said):
                ask_again(self._index, self._asked_pool, *self._knowledge, node)
                self._tell_guests(node)
                learn_at(self._grower.weights, self._tree, self._asked_scratch, node, token)


def _drafted(nodes: Records) -> Draft:
    """Return the tree as a draft; it is sound as it is grown."""
    names = {"tokens": "token", "parents": "parent", "weight": "weight", "source": "source", "depth": "depth"}
    columns = {name: nodes[field].copy() for name, field in names.items()}
    return Draft.sound(**columns, probe=np.zeros(len(nodes), np.bool_))


def _check(
    sources: tuple[str | Jacobi | Source, ...], pools: tuple[Pool, ...], vocab_size: int | None, min_chance: float
) -> None:
    for source in sources:
        if not isinstance(source, Source | Jacobi) and source not in SOURCES[1:]:
            raise InvalidArgument(
                f"sources has {source!r}, which is not known; choose from {', '.join(SOURCES[1:])}, or give an object "
                "with the methods start, extend, successors and observe"
            )
    if sum(isinstance(source, Source) for source in sources) > GUESTS:
        raise InvalidArgument(f"sources has more than {GUESTS} objects; join some of them in one")
    if sum(isinstance(source, Jacobi) or source == "jacobi" for source in sources) > 1:
        raise InvalidArgument("sources has more than one window; give one Jacobi")
    for pool in pools:
        if not isinstance(pool, Pool):
            raise InvalidArgument(f"pools has a {type(pool).__name__}; give lookahead.Pool objects")
    if vocab_size is not None and vocab_size < 1:
        raise InvalidArgument(f"vocab_size={vocab_size}; give the number of tokens the model knows, or None")
    if not 0.0 <= min_chance <= 1.0:
        raise InvalidArgument(f"min_chance={min_chance} is not a chance; give a number from 0 to 1")
