"""Where one text stands in its grammar, and what may follow it and every draft under it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lookahead.draft import Draft, IntArray
from lookahead.errors import GrammarError
from lookahead.grammar.masks import Words, finish, words
from lookahead.grammar.values import Key
from lookahead.grammar.vocabulary import Vocabulary

ENDED, ROOT = 0, 1
"""States: of a text that has ended (or left the grammar), and of the text that was settled last."""
PATIENCE = 0.25
"""Seconds that the engine may take over drafts of one step; a mask takes some microseconds."""

_ENDLESS = "the text is complete, and there is no token to end it with; set eos_token_id"
_STUCK = "no token of the model may follow here; the grammar asks for text that its vocabulary cannot write"


class Matcher:
    """Follows one text through a grammar, and the drafts under it as a tree of states.

    A state is a number: `ROOT`, what `child` returns, or `ENDED`, after which only the end token is allowed. States
    live until the text is settled anew. Every mask is computed when it is first asked for, and once.

    Engines only ever move forward: one stands at the settled text, and copies of it at the tips of the tree. To take
    tokens back is not safe with llguidance 1.9: some masks differ afterwards from those of an engine that has seen the
    same text. An engine tells of failures by flags instead of exceptions, and never recovers from one: so it is asked
    after every step, replaced by a new one that has seen the text alone, and only what that one fails at too is an
    error.

    Args:
        compiled: gives engines, see `lookahead.grammar.grammar.Compiled`.
        ends: the tokens that end a text, allowed exactly where the grammar accepts. The engine never sees them.
        size: tokens the model knows; the others are never allowed.

    Attributes:
        ends: the tokens that end a text.
        vocabulary: the tokens.
        keys: those that a JSON Schema names, in its order.
        masks: [states, words] uint32, the mask of each state, where it was computed.
        computed: masks that were computed so far.
    """

    def __init__(self, compiled: Any, ends: Iterable[int], size: int) -> None:
        self._compiled, self._engine = compiled, compiled.take()
        self.computed = 0
        self._size, self.ends = size, tuple(end for end in ends if 0 <= end < size)
        self.vocabulary: Vocabulary = compiled.vocabulary
        self.keys: list[Key] = compiled.keys
        self._bytes = 4 * words(compiled.size)
        self._ends, self._own_ends = np.array(self.ends, np.int64), np.array(compiled.ends, np.int64)
        self._make_room(np.zeros((64, max(words(size), words(compiled.size))), np.uint32))
        for end in self.ends:
            self.masks[ENDED, end >> 5] |= np.uint32(1 << (end & 31))
        self._settled: IntArray = np.zeros(256, np.int32)
        self._length = 0  # of the settled text
        self._read = 0  # tokens of it that the engine has taken; fewer where the text has ended
        self._plant(ended=False)

    def close(self) -> None:
        """Forget the engines; the matcher is of no use any more."""
        self._engine = None
        self._ahead.clear()

    # States

    @property
    def root(self) -> int:
        """The state of the settled text."""
        return self._root

    def child(self, state: int, token: int) -> int:
        """Return the state after one more token; `ENDED` where it ends the text or is not allowed."""
        if state == ENDED:
            return ENDED
        known = self._children[state].get(token)
        if known is not None:
            return known
        child = self._add(state, token) if token not in self.ends and self.allows(state, token) else ENDED
        self._children[state][token] = child
        return child

    def mask(self, state: int) -> Words:
        """Return the mask of `state`, [words] uint32: what may follow.

        Raises:
            GrammarError: the engine gives up, or nothing may follow.
        """
        if not self._known[state]:
            self._compute(state)
        return self.masks[state]  # type: ignore[no-any-return]

    def allows(self, state: int, token: int) -> bool:
        """Return whether `token` may follow: whether its bit is set, whatever else the engine would put up with."""
        return 0 <= token < self._size and bool(int(self.mask(state)[token >> 5]) >> (token & 31) & 1)

    def accepts(self, state: int | None = None) -> bool:
        """Return whether the text may end at `state`; None: the settled text."""
        state = self._root if state is None else state
        return any(self.allows(state, end) for end in self.ends) if self.ends else self._accepting(state)

    def enter(self, state: int, token: int) -> int:
        """Return `child`, its mask computed, for a text that nobody has written yet.

        -1 where the engine gives up on it, or takes too long over such texts.
        """
        if self._spent > PATIENCE:
            return -1
        begin = time.perf_counter()
        try:
            child = self.child(state, token)
            if not self._known[child]:
                self._compute(child)
        except GrammarError:
            child = -1
        self._spent += time.perf_counter() - begin
        return child

    # The text

    def settle(self, tokens: Sequence[int] | IntArray) -> int:
        """Take `tokens` for the text so far and return its state; all other states are gone.

        A text that does not go on from the last one is followed from where they part.
        """
        text = np.asarray(tokens, np.int32)
        state = self._find(text)
        if state is None:
            state = self._restart(text)
        self._keep(text, state)
        return self._root

    def follow(self, tokens: Sequence[int] | IntArray) -> int:
        """Return the state of a text that begins with the settled one; other texts are settled first."""
        state = self._find(np.asarray(tokens, np.int32))
        return self.settle(tokens) if state is None else state

    def prune(self, draft: Draft) -> Draft:
        """Return `draft` without what may not follow its parent, judged by the parent's mask; node 0 is settled."""
        states, kept, place = [self._root], [0], {0: 0}
        for node in range(1, len(draft)):
            parent, token = int(draft.parents[node]), int(draft.tokens[node])
            state = -1
            if parent in place and token not in self.ends:
                state = self._child_or_none(states[place[parent]], token)
            if state > ENDED:
                place[node] = len(kept)
                kept.append(node)
                states.append(state)
        if len(kept) == len(draft):
            return draft
        parents = np.array([-1, *(place[int(draft.parents[node])] for node in kept[1:])], np.int32)
        return Draft(draft.tokens[kept], parents, draft.weight[kept], draft.source[kept], draft.probe[kept])

    def complete(self, draft: Draft) -> None:
        """Compute the masks of all nodes of a pruned draft, depth first; for when the host has time to spare."""
        below: list[list[int]] = [[] for _ in range(len(draft))]
        for node in range(len(draft) - 1, 0, -1):
            below[int(draft.parents[node])].append(node)
        waiting = [(0, self._root)]
        while waiting:
            node, state = waiting.pop()
            if state > ENDED and self.enter_at(state):
                waiting += [(child, self._child_or_none(state, int(draft.tokens[child]))) for child in below[node]]

    def enter_at(self, state: int) -> bool:
        """Compute the mask of `state`; return False where the engine gives up on it."""
        try:
            self.mask(state)
        except GrammarError:
            return False
        return True

    def _child_or_none(self, state: int, token: int) -> int:
        try:
            return self.child(state, token)
        except GrammarError:
            return ENDED

    def _find(self, text: IntArray) -> int | None:
        """Return the state of `text`; None where it does not begin with the settled text."""
        n = self._length
        if len(text) < n or text[:n].tobytes() != self._settled[:n].tobytes():
            return None
        state = self._root
        for token in text[n:].tolist():
            state = self.child(state, token)
        return state

    def _restart(self, text: IntArray) -> int:
        """Go back to where `text` and the settled text part, and follow `text` from there."""
        n = min(len(text), self._read)
        same = text[:n] == self._settled[:n]
        shared = n if same.all() else int(same.argmin())
        self._read = self._length = shared
        self._plant(ended=False)
        self._try(self._read_again, ROOT)
        return self._find(text)  # type: ignore[return-value]

    def _keep(self, text: IntArray, state: int) -> None:
        """Make `state` the root."""
        if len(text) > len(self._settled):
            self._settled = np.zeros(2 * len(text), np.int32)
            self._settled[: self._length] = text[: self._length]
        if state != ENDED:
            self._engine = self._try(self._engine_at, state)
            self._read = len(text)
        known = self._known[state] and state != ENDED
        if known:
            self.masks[ROOT] = self.masks[state]
        self._settled[self._length : len(text)] = text[self._length :]
        self._length = len(text)
        self._plant(ended=state == ENDED)
        self._known[ROOT] = known

    # The engine

    def _plant(self, *, ended: bool) -> None:
        """Begin a tree of states."""
        self._root = ENDED if ended else ROOT
        self._parent, self._token, self._depth = [ENDED, ENDED], [-1, -1], [0, 0]
        self._children: list[dict[int, int]] = [{}, {}]
        self._known = [True, False]
        self._ahead: dict[int, Any] = {}  # engines by the state that they stand at
        self._spent = 0.0  # seconds, on texts that nobody has written yet

    def _add(self, parent: int, token: int) -> int:
        state = len(self._parent)
        if state == len(self.masks):
            self.reserve(state)
        self._parent.append(parent)
        self._token.append(token)
        self._depth.append(self._depth[parent] + 1)
        self._children.append({})
        self._known.append(False)
        return state

    def reserve(self, more: int) -> None:
        """Make room for so many more states, so that `masks` stays the same array meanwhile."""
        states = len(self._parent) + more
        if states > len(self.masks):
            masks = np.zeros((states, self.masks.shape[1]), np.uint32)
            masks[: len(self.masks)] = self.masks
            self._make_room(masks)

    def _make_room(self, masks: Words) -> None:
        self.masks, self._address, self._stride = masks, masks.ctypes.data, masks.strides[0]

    def _compute(self, state: int) -> None:
        self._try(self._mask_into, state)
        self._known[state] = True
        self.computed += 1

    def _accepting(self, state: int) -> bool:
        return state == ENDED or bool(self._try(self._engine_at, state).is_accepting())

    def _mask_into(self, state: int) -> None:
        engine = self._engine_at(state)
        engine.unsafe_compute_mask_ptr(self._address + state * self._stride, self._bytes)
        _check(engine)
        accepting = engine.is_accepting()
        if not finish(self.masks, state, self._bytes // 4, self._size, self._own_ends, self._ends, accepting):
            raise GrammarError(_ENDLESS if accepting else _STUCK)

    def _engine_at(self, state: int) -> Any:
        """Return one that stands at `state`: the nearest one on the way there, moved on; or a copy of the root's."""
        ahead, at, tokens = self._ahead, state, []
        while at != ROOT and at not in ahead:
            tokens.append(self._token[at])
            at = self._parent[at]
        if at == state:
            return self._engine if state == ROOT else ahead[state]
        engine = self._engine.deep_copy() if at == ROOT else ahead.pop(at)
        for token in reversed(tokens):
            engine.consume_token(token)
        _check(engine)
        ahead[state] = engine
        return engine

    def _try(self, action: Any, state: int) -> Any:
        """Do `action`; where the engine fails, once more with one that has seen nothing but the text."""
        try:
            return action(state)
        except _EngineFailed:
            pass
        try:
            self._renew()
            return action(state)
        except _EngineFailed as failure:
            self._ahead.clear()
            raise GrammarError(str(failure)) from None

    def _renew(self) -> None:
        """Replace all engines by one that stands at the root."""
        self._ahead.clear()
        self._engine = self._compiled.renew()
        self._read_text()

    def _read_again(self, _: int) -> None:
        self._engine = self._compiled.take()
        self._read_text()

    def _read_text(self) -> None:
        for token in self._settled[: self._read].tolist():
            self._engine.consume_token(token)
        _check(self._engine)


class _EngineFailed(GrammarError):
    """An engine is of no use any more."""


def _check(engine: Any) -> None:
    if engine.is_error():
        raise _EngineFailed(engine_words(engine.get_error()))


def engine_words(text: str) -> str:
    """Return the engine's own words without the state that it appends."""
    head = text.split("\n<")[0].strip()
    if head.startswith("NoExtension"):
        return _STUCK
    return head if head else "the grammar engine failed and did not say why"
