"""The cache for token trees against a naive twin: one list of rows for each row of the batch."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from law import same_caches
from models import PAD, tiny
from transformers import DynamicCache, EncoderDecoderCache, StaticCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from zoo import ZOO, zoo

from lookahead import UnsupportedCache
from lookahead.cache import NAME, TreeCache, apart, fill, joined, length_of, opened, require_ordinary
from lookahead.draft import Draft
from lookahead.mask import TreeMask

HEADS, WIDTH, LAYERS = 2, 3, 2


def ordinary(rows: int, prompt: int) -> DynamicCache:
    """Return a cache as a prefill leaves it; every number tells row, slot, layer and whether it is a key."""
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(*(rows_of(list(range(rows)), prompt, [layer, side]) for side in (0, 1)), layer)
    return cache


def rows_of(rows: list[int], count: int, tag: list[int], start: int = 0) -> torch.Tensor:
    values = torch.zeros(len(rows), HEADS, count, WIDTH)
    for b, row in enumerate(rows):
        for slot in range(count):
            values[b, :, slot] = torch.tensor([row * 1000 + start + slot, *tag], dtype=torch.float)
    return values


@st.composite
def stories(draw: Any) -> dict[str, Any]:
    """Draw passes of a batch: for each, how many nodes ran, which each row keeps, how many it takes back afterwards."""
    rows, passes = draw(st.integers(1, 4)), []
    for _ in range(draw(st.integers(1, 8))):
        size = draw(st.integers(1, 6))
        nodes = st.lists(st.integers(0, size - 1), unique=True, max_size=size).map(sorted)
        keeps = [draw(st.one_of(nodes, st.integers(0, size).map(lambda n: list(range(n))))) for _ in range(rows)]
        passes.append((size, keeps, [draw(st.integers(0, 2)) for _ in range(rows)]))
    limits = {"REALIGN": draw(st.sampled_from((1, 3, 128))), "BLOCK": draw(st.sampled_from((1, 2, 128)))}
    return {
        "rows": rows,
        "prompt": draw(st.integers(1, 5)),
        "room": draw(st.integers(0, 9)),
        "passes": passes,
        "limits": limits,
    }


@settings(max_examples=150)
@given(story=stories())
def test_rows_hold_what_they_kept(story: dict[str, Any]) -> None:
    rows, prompt = story["rows"], story["prompt"]
    given_cache = ordinary(rows, prompt)
    naive: list[list[int]] = [[] for _ in range(rows)]
    with mock.patch.multiple("lookahead.cache", **story["limits"]):
        cache = TreeCache(given_cache, rows=rows, room=story["room"])
        mask = TreeMask(torch.ones(rows, prompt, dtype=torch.bool), torch.float32)
        number = 100
        for size, keeps, drops in story["passes"]:
            for layer in range(LAYERS):
                keys, values = cache.update(
                    *(rows_of(list(range(rows)), size, [layer, s], number) for s in (0, 1)), layer
                )
                assert keys.shape == values.shape == (rows, HEADS, cache.used + size, WIDTH)
            if max(map(len, keeps)) > 0:
                mask.keep([len(k) for k in keeps], cache.used)
            cache.keep(keeps)
            for row, drop in enumerate(drops):
                naive[row] += [number + node for node in keeps[row]]
                drop = min(drop, len(naive[row]))
                mask.hide(row, cache.drop(row, drop))
                del naive[row][len(naive[row]) - drop :]
            if cache.wants_realign():
                cache.realign()
                mask.realign([len(n) for n in naive])
                assert cache.used - cache.prompt == max(map(len, naive))
            number += size
            _holds(cache, mask, naive)
        tokens = min(map(len, naive))
        cache.give_back(given_cache, tokens)
    for layer, kept in enumerate(given_cache.layers):
        for side, states in enumerate((kept.keys, kept.values)):
            assert states.shape == (rows, HEADS, prompt + tokens, WIDTH)
            for row in range(rows):
                expected = [row * 1000 + slot for slot in [*range(prompt), *naive[row][:tokens]]]
                assert states[row, 0, :, 0].tolist() == expected
                assert set(states[row, :, :, 1].flatten().tolist()) == {layer}
                assert set(states[row, :, :, 2].flatten().tolist()) == {side}


def _holds(cache: TreeCache, mask: TreeMask, naive: list[list[int]]) -> None:
    """The slots that row b may see are, in order, the prompt and what the naive twin holds."""
    used = cache.used
    shown = mask.tree(torch.ones(len(naive), 1, 1, dtype=torch.bool), used)
    assert shown.shape[-1] == used + 1
    for row, held in enumerate(naive):
        visible = [slot for slot in range(used) if shown[row, 0, 0, slot] == 0]
        keys = cache.layers[0].keys[row, 0, :, 0].tolist()
        expected = [row * 1000 + slot for slot in [*range(cache.prompt), *held]]
        assert sorted(keys[slot] for slot in visible) == expected
        assert [keys[slot] for slot in cache.generated(row)] == expected[cache.prompt :]
    assert cache.has_holes == any(len(held) != used - cache.prompt for held in naive)
    assert cache.get_seq_length() == used


@settings(max_examples=100)
@given(parents=st.lists(st.integers(0, 50), min_size=0, max_size=9), used=st.integers(1, 5), rows=st.integers(1, 3))
def test_mask_shows_ancestors_and_nothing_else(parents: list[int], used: int, rows: int) -> None:
    tree = [-1] + [p % (i + 1) for i, p in enumerate(parents)]
    draft = Draft(np.arange(len(tree)), np.array(tree))
    ancestors = torch.from_numpy(np.stack([draft.ancestors()] * rows))
    prompt_mask = torch.ones(rows, used, dtype=torch.bool)
    prompt_mask[-1, 0] = used == 1
    shown = TreeMask(prompt_mask, torch.float32).tree(ancestors, used)
    assert shown.shape == (rows, 1, len(tree), used + len(tree))
    assert set(shown.flatten().tolist()) <= {0.0, torch.finfo(torch.float32).min}
    for row in range(rows):
        for node in range(len(tree)):
            seen = {slot for slot in range(shown.shape[-1]) if shown[row, 0, node, slot] == 0}
            prompt = {slot for slot in range(used) if prompt_mask[row, slot]}
            assert seen == prompt | {used + n for n in draft.path(node)}


class EagerMask:
    """The naive twin of `TreeMask`: the slots that each row sees, written down at once."""

    def __init__(self, prompt_mask: torch.Tensor) -> None:
        self.seen = [{slot for slot in range(len(row)) if row[slot]} for row in prompt_mask.tolist()]
        self.prompt = prompt_mask.shape[1]

    def keep(self, counts: list[int], used: int) -> None:
        for seen, count in zip(self.seen, counts, strict=True):
            seen |= set(range(used, used + count))

    def hide(self, row: int, slots: list[int]) -> None:
        self.seen[row] -= set(slots)

    def realign(self, counts: list[int]) -> None:
        for seen, count in zip(self.seen, counts, strict=True):
            seen -= {slot for slot in seen if slot >= self.prompt}
            seen |= set(range(self.prompt, self.prompt + count))

    def tree(self, ancestors: torch.Tensor, used: int) -> torch.Tensor:
        batch, nodes, _ = ancestors.shape
        shown = torch.full((batch, 1, nodes, used + nodes), torch.finfo(torch.float32).min)
        for row, seen in enumerate(self.seen):
            shown[row, 0, :, sorted(slot for slot in seen if slot < used)] = 0
            shown[row, 0, :, used:][ancestors[row]] = 0
        return shown


def ancestors_of(draw: Any, rows: int) -> torch.Tensor:
    size = draw(st.integers(1, 5))
    parents = [[-1, *(draw(st.integers(0, i - 1)) for i in range(1, size))] for _ in range(rows)]
    return torch.from_numpy(np.stack([Draft(np.zeros(size, int), np.array(tree)).ancestors() for tree in parents]))


@settings(max_examples=200)
@given(data=st.data())
def test_a_mask_that_waits_shows_what_an_eager_one_shows(data: Any) -> None:
    """Many passes may go by before somebody asks for the mask; a few of them keep enough to make the buffer grow."""
    draw = data.draw
    rows, prompt = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    prompt_mask = torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=prompt, max_size=prompt), min_size=rows,
                                             max_size=rows)))  # fmt: skip
    mask, naive, used = TreeMask(prompt_mask, torch.float32), EagerMask(prompt_mask), prompt
    steps = st.sampled_from(["keep"] * 6 + ["tree"] * 2 + ["hide", "realign"])
    for step in [*draw(st.lists(steps, max_size=24)), "tree"]:
        if step == "tree":
            ancestors = ancestors_of(draw, rows)
            shown = mask.tree(ancestors, used)
            assert shown.shape == (rows, 1, ancestors.shape[1], used + ancestors.shape[1])
            assert torch.equal(shown, naive.tree(ancestors, used))
        elif step == "keep":
            most = draw(st.sampled_from([1, 1, 1, 2, 3, 300]))
            same = draw(st.booleans())
            counts = [most] + [most if same else draw(st.integers(0, most)) for _ in range(rows - 1)]
            for each in (mask, naive):
                each.keep(counts, used)
            used += most
        elif step == "hide":
            row = draw(st.integers(0, rows - 1))
            slots = [slot for slot in range(prompt, used) if slot in naive.seen[row]]
            dropped = slots[len(slots) - draw(st.integers(0, min(3, len(slots)))) :]
            for each in (mask, naive):
                each.hide(row, dropped)
        else:
            counts = [sum(slot >= prompt for slot in seen) for seen in naive.seen]
            for each in (mask, naive):
                each.realign(counts)
            used = prompt + max(counts)


def test_only_ordinary_caches_are_taken() -> None:
    config = tiny("llama").config
    require_ordinary(DynamicCache())
    require_ordinary(DynamicCache(config=config))
    sliding = DynamicCache()
    sliding.layers.append(DynamicSlidingWindowLayer(8))
    require_ordinary(sliding)
    others = [StaticCache(config=config, max_cache_len=8), DynamicCache(offloading=True), None, ()]
    for cache in others:
        with pytest.raises(UnsupportedCache, match=r"call model\.generate\(\)"):
            require_ordinary(cache)

    class Mine(DynamicCache):
        pass

    with pytest.raises(UnsupportedCache, match="Mine"):
        require_ordinary(Mine())


# Windows that have dropped positions, and caches that are more than one

KINDS = ["full", "sliding", *(["dummy"] if hasattr(cache_utils, "DummyLayer") else [])]


def layered(kinds: list[tuple[str, int]]) -> DynamicCache:
    """Return an empty cache of such layers; a window has a width."""
    makers = {"full": lambda _: DynamicLayer(), "sliding": DynamicSlidingWindowLayer, "dummy": dummy}
    cache = DynamicCache()
    cache.layers = [makers[kind](width) for kind, width in kinds]
    return cache


def dummy(_: int) -> Any:
    return cache_utils.DummyLayer()


def advance(cache: Any, tokens: list[list[int]]) -> None:
    """Run a pass over `tokens[b]` in every layer that holds something."""
    for number, layer in enumerate(cache.layers):
        if type(layer).__name__ != "DummyLayer":
            cache.update(*(states_of(tokens, number, side) for side in (0, 1)), number)


def states_of(tokens: list[list[int]], layer: int, side: int) -> torch.Tensor:
    """Return states that tell token, row, layer, and whether they are keys."""
    states = torch.zeros(len(tokens), HEADS, len(tokens[0]), WIDTH)
    states[..., 0] = torch.tensor(tokens, dtype=torch.float)[:, None]
    states[..., 1], states[..., 2] = layer, side
    return states


layers = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(2, 6)), min_size=1, max_size=4).filter(
    lambda kinds: any(kind != "dummy" for kind, _ in kinds)
)


@settings(max_examples=150)
@given(kinds=layers, pieces=st.lists(st.integers(1, 9), min_size=1, max_size=3), story=stories())
def test_an_opened_cache_that_is_filled_back_is_one_that_plainly_went_on(
    kinds: list[tuple[str, int]], pieces: list[int], story: dict[str, Any]
) -> None:
    """Whatever windows have dropped before, and however drafts were verified since."""
    rows, numbers = story["rows"], iter(range(1, 10_000))
    own, plain = layered(kinds), layered(kinds)
    for piece in pieces:
        tokens = fresh(numbers, rows, piece)
        for cache in (own, plain):
            advance(cache, tokens)
    prompt = sum(pieces)
    whole = opened(own)
    assert (whole is own) == all(kind == "full" for kind, _ in kinds)
    require_ordinary(whole)
    for (kind, width), layer in zip(kinds, whole.layers, strict=True):
        if kind != "dummy":
            assert type(layer) is DynamicLayer
            assert layer.get_seq_length() == layer.keys.shape[-2] == layer.values.shape[-2] == prompt
            dropped = max(prompt - width + 1, 0) if kind == "sliding" else 0
            assert not layer.keys[:, :, :dropped].any()
            assert layer.keys[:, :, dropped:, 0].all()
    tree = TreeCache(whole, rows=rows, room=story["room"])
    held: list[list[int]] = [[] for _ in range(rows)]
    for size, keeps, drops in story["passes"]:
        tokens = fresh(numbers, rows, size)
        advance(tree, tokens)
        tree.keep(keeps)
        for row, drop in enumerate(drops):
            held[row] += [tokens[row][node] for node in keeps[row]]
            drop = min(drop, len(held[row]))
            tree.drop(row, drop)
            del held[row][len(held[row]) - drop :]
    kept = tree.complete
    tree.give_back(own, kept)
    for column in range(kept):
        advance(plain, [[row[column]] for row in held])
    same_caches(plain, own)
    more = fresh(numbers, rows, 3)
    for cache in (own, plain):
        advance(cache, more)
    same_caches(plain, own)


def fresh(numbers: Any, rows: int, count: int) -> list[list[int]]:
    """Return tokens that nobody has had."""
    return [[next(numbers) for _ in range(count)] for _ in range(rows)]


@given(width=st.integers(2, 6), pieces=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_a_layer_is_filled_as_passes_fill_it(width: int, pieces: list[int]) -> None:
    """All at once, also one that nobody has used yet."""
    for kind in ("full", "sliding"):
        passed, filled = layered([(kind, width)]), layered([(kind, width)])
        tokens = [list(range(1, sum(pieces) + 1))] * 2
        for end, piece in zip(np.cumsum(pieces).tolist(), pieces, strict=True):
            advance(passed, [row[end - piece : end] for row in tokens])
        fill(filled.layers[0], *(states_of(tokens, 0, side) for side in (0, 1)))
        same_caches(passed, filled)
        assert length_of(filled, 99) == sum(pieces)


def test_an_empty_cache_opens_empty() -> None:
    whole = opened(layered([("sliding", 4), ("full", 4)]))
    assert [layer.get_seq_length() for layer in whole.layers] == [0, 0]
    advance(whole, [[1, 2, 3, 4, 5, 6]])
    assert [layer.get_seq_length() for layer in whole.layers] == [6, 6]


@pytest.mark.parametrize(
    "name", [name for name in ("llama", "gemma3_text", "lfm2", "qwen3_next", "mamba2") if name in ZOO]
)
def test_the_length_of_a_cache_is_what_it_has_seen(name: str) -> None:
    """States alone do not tell; windows tell, though they hold less."""
    model, ids = zoo(name), torch.full((1, 13), PAD + 1)
    cache = DynamicCache(config=model.config)
    given_as = "cache_params" if name == "mamba2" and NAME != "cache" else NAME
    with torch.no_grad():
        model(ids, use_cache=True, **{given_as: cache})
    assert length_of(cache, 13) == 13
    assert length_of(cache, 99) == (13 if name != "mamba2" else 99)


def test_a_cache_of_two_is_taken_apart_and_joined() -> None:
    """The caches stay the objects that they are; a cross cache knows that it has been filled."""
    own, cross = ordinary(1, 4), ordinary(1, 7)
    both = EncoderDecoderCache(own, cross)
    assert apart(both) == (own, cross)
    assert apart(own) == (own, None)
    assert joined(own, None) is own
    again = joined(*apart(both))
    assert type(again) is EncoderDecoderCache
    assert apart(again) == (own, cross)
    assert again.is_updated == both.is_updated
    assert all(again.is_updated.values())
