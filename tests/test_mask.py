"""The masks of all kinds of layers against a naive twin: for every node and slot, the rule written out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lookahead.draft import Draft
from lookahead.mask import Reach, TreeMask, TreeMasks

DTYPES = (torch.float32, torch.bfloat16, torch.float64)

reaches = st.one_of(
    st.just(Reach()), st.integers(1, 6).map(lambda n: Reach(sliding=n)), st.integers(1, 6).map(lambda n: Reach(chunk=n))
)


@dataclass
class Row:
    """What a batch row holds: the place of every token of its prompt, and the slots of what it has generated."""

    shown: list[bool]
    held: list[int] = field(default_factory=list)

    @property
    def places(self) -> dict[int, int]:
        """Places by slot: those of the prompt, padding included, then those of what was generated."""
        places = {slot: slot for slot, shown in enumerate(self.shown) if shown}
        return places | {slot: len(self.shown) + k for k, slot in enumerate(self.held)}

    @property
    def first(self) -> int:
        """The place of its first token."""
        return self.shown.index(True) if any(self.shown) else len(self.shown)

    def sees(self, reach: Reach, node: int, other: int) -> bool:
        """Whether a node at place `node` may look at a token at place `other` that is not hidden from it."""
        if reach.sliding:
            return other > node - reach.sliding
        if reach.chunk:
            return (other - self.first) // reach.chunk == (node - self.first) // reach.chunk
        return True


def naive(rows: list[Row], reach: Reach, trees: list[Draft], used: int) -> Any:
    """Return [B, 1, N, used + N] bool, what each node sees; a short tree is filled up with nodes by themselves."""
    size = max(len(tree) for tree in trees)
    seen = np.zeros((len(rows), 1, size, used + size), np.bool_)
    for b, (row, tree) in enumerate(zip(rows, trees, strict=True)):
        behind = len(row.shown) + len(row.held)
        for node in range(size):
            path = tree.path(node) if node < len(tree) else [node]
            at = behind + len(path) - 1
            for slot, place in row.places.items():
                seen[b, 0, node, slot] = row.sees(reach, at, place)
            for depth, above in enumerate(path):
                seen[b, 0, node, used + above] = row.sees(reach, at, behind + depth)
    return seen


class Story:
    """A batch whose rows keep, take back and move tokens; every step is told to masks and twin alike."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        count, self.prompt = draw(st.integers(1, 3)), draw(st.integers(1, 9))
        self.rows = [Row(draw(self.prompts())) for _ in range(count)]
        self.used = self.prompt

    def prompts(self) -> st.SearchStrategy[list[bool]]:
        """Whole, left-padded, and holed; some rows have nothing."""
        left = st.integers(0, self.prompt).map(lambda n: [False] * n + [True] * (self.prompt - n))
        return left | st.lists(st.booleans(), min_size=self.prompt, max_size=self.prompt)

    @property
    def prompt_mask(self) -> torch.Tensor:
        return torch.tensor([row.shown for row in self.rows])

    def keep(self, *masks: Any) -> None:
        most = self.draw(st.sampled_from([1, 1, 2, 3, 4, 300]))
        same = self.draw(st.booleans())
        counts = [most if same else self.draw(st.integers(0, most)) for _ in self.rows]
        counts[self.draw(st.integers(0, len(counts) - 1))] = most
        for each in masks:
            each.keep(counts, self.used)
        for row, count in zip(self.rows, counts, strict=True):
            row.held += range(self.used, self.used + count)
        self.used += most

    def hide(self, *masks: Any) -> None:
        number = self.draw(st.integers(0, len(self.rows) - 1))
        row = self.rows[number]
        kept = len(row.held) - self.draw(st.integers(0, min(3, len(row.held))))
        for each in masks:
            each.hide(number, row.held[kept:])
        del row.held[kept:]

    def realign(self, *masks: Any) -> None:
        counts = [len(row.held) for row in self.rows]
        for each in masks:
            each.realign(counts)
        for row, count in zip(self.rows, counts, strict=True):
            row.held = list(range(self.prompt, self.prompt + count))
        self.used = self.prompt + max(counts)

    def trees(self) -> list[Draft]:
        return [self.tree() for _ in self.rows]

    def tree(self) -> Draft:
        size = self.draw(st.integers(1, 6))
        parents = [-1, *(self.draw(st.integers(0, i - 1)) for i in range(1, size))]
        return Draft(np.zeros(size, np.int32), np.array(parents))

    def asked(self, trees: list[Draft]) -> tuple[torch.Tensor, Any, int]:
        """Return what `TreeMasks.tree` is given for `trees`."""
        size = max(len(tree) for tree in trees)
        ancestors, places = np.zeros((len(trees), size, size), np.bool_), np.zeros((len(trees), size), np.int64)
        ancestors[:, range(size), range(size)] = True
        for b, (row, tree) in enumerate(zip(self.rows, trees, strict=True)):
            ancestors[b, : len(tree), : len(tree)] = tree.ancestors()
            places[b] = self.prompt + len(row.held)
            places[b, : len(tree)] += tree.depth
        return torch.from_numpy(ancestors), places, self.used


STEPS = st.lists(st.sampled_from(["keep"] * 6 + ["tree"] * 3 + ["hide", "realign"]), max_size=20)


def assert_shows(shown: torch.Tensor, seen: Any, dtype: torch.dtype) -> None:
    """A mask is 0 where something is seen, and the least number of its type everywhere else."""
    assert shown.dtype == dtype
    assert tuple(shown.shape) == seen.shape
    hidden = torch.full(seen.shape, torch.finfo(dtype).min, dtype=dtype)
    assert torch.equal(shown, hidden.masked_fill(torch.from_numpy(seen), 0))


@settings(max_examples=300)
@given(data=st.data(), kinds=st.lists(reaches, min_size=1, max_size=3), dtype=st.sampled_from(DTYPES))
def test_masks_show_what_the_places_say(data: Any, kinds: list[Reach], dtype: torch.dtype) -> None:
    """Whatever was kept, taken back and moved before, of rows that run apart, for several kinds of layers at once."""
    story, keyed = Story(data.draw), len(kinds) > 1 or data.draw(st.booleans())
    named = {f"kind {number}": reach for number, reach in enumerate(kinds)}
    masks = TreeMasks(story.prompt_mask, dtype, named, keyed=keyed)
    for step in [*data.draw(STEPS), "tree"]:
        if step != "tree":
            getattr(story, step)(masks)
            continue
        trees = story.trees()
        shown = masks.tree(*story.asked(trees))
        assert isinstance(shown, dict) == keyed
        for name, reach in named.items():
            assert_shows(shown[name] if keyed else shown, naive(story.rows, reach, trees, story.used), dtype)


@settings(max_examples=100)
@given(data=st.data(), far=st.integers(400, 500))
def test_what_reaches_behind_the_text_reaches_everywhere(data: Any, far: int) -> None:
    story = Story(data.draw)
    kinds = {"all": Reach(), "sliding": Reach(sliding=far), "chunk": Reach(chunk=far)}
    masks = TreeMasks(story.prompt_mask, torch.float32, kinds, keyed=True)
    for step in data.draw(st.lists(st.sampled_from(["keep", "keep", "hide", "realign"]), max_size=6)):
        if story.used < 20:  # what is kept at once may be 300
            getattr(story, step)(masks)
    shown = masks.tree(*story.asked(story.trees()))
    assert torch.equal(shown["all"], shown["sliding"])
    assert torch.equal(shown["all"], shown["chunk"])


class SlicedMask(TreeMask):
    """A mask that is written as on other devices: by slices of a tensor."""

    def _look(self) -> None:
        self._bits = None


@settings(max_examples=200)
@given(data=st.data(), dtype=st.sampled_from([*DTYPES, torch.float16]))
def test_what_the_host_writes_is_what_slices_would(data: Any, dtype: torch.dtype) -> None:
    """On a CPU the buffer is written as whole numbers; bit for bit, since 0.0 and -0.0 are equal."""
    story = Story(data.draw)
    masks = [kind(story.prompt_mask, dtype) for kind in (TreeMask, SlicedMask)]
    for step in [*data.draw(STEPS), "tree"]:
        if step != "tree":
            getattr(story, step)(*masks)
            continue
        ancestors, _, used = story.asked(story.trees())
        written, sliced = (mask.tree(ancestors, used).contiguous() for mask in masks)
        assert written.dtype == sliced.dtype == dtype
        assert torch.equal(written.view(torch.uint8), sliced.view(torch.uint8))
    assert all(mask._bits is None for mask in masks[1:])
    assert masks[0]._bits is not None


def test_a_place_stays_the_same_however_often_slots_move() -> None:
    """A window of two shows the last token alone, also where it lies in another slot by now."""
    masks = TreeMasks(torch.ones(1, 3, dtype=torch.bool), torch.float32, {"attention": Reach(sliding=2)})
    masks.keep([2], 3)
    for _ in range(3):
        masks.realign([2])
    shown = masks.tree(torch.ones(1, 1, 1, dtype=torch.bool), np.array([[5]]), 5)
    assert (shown[0, 0, 0] == 0).tolist() == [False] * 4 + [True] * 2


@pytest.mark.parametrize("reach", [Reach(), Reach(sliding=4), Reach(chunk=4)])
def test_only_a_layer_that_looks_everywhere_is_whole(reach: Reach) -> None:
    assert reach.whole == (reach == Reach())
