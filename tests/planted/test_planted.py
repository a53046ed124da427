"""A test that cannot fail is a defect: each bug planted here has to be caught by the battery of `law.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from law import BATTERY, Case, assert_exact, assert_steps_fit, model_of

import lookahead.cache
import lookahead.mask
from lookahead.cache import TreeCache, TreeLayer
from lookahead.decode import Decoder
from lookahead.draft import Draft
from lookahead.mask import TreeMask
from lookahead.progress import Contexts, Progress, Records, Stops
from lookahead.sampling import NoiseLedger, Sampler
from lookahead.script import Script
from lookahead.states import StateCache
from lookahead.static.board import Board
from lookahead.static.cache import StaticCache, StaticLayer
from lookahead.static.mask import StaticMasks
from lookahead.static.space import Space
from lookahead.static.target import StaticTarget
from lookahead.support import supports
from lookahead.target import Target

BUGS: dict[str, Callable[[], Any]] = {}


def bug(plant: Callable[[], Any]) -> Callable[[], Any]:
    """Add `plant`, whose docstring says what is wrong, to the bugs that have to be caught."""
    BUGS[plant.__name__] = plant
    return plant


def instead(owner: Any, name: str) -> Callable[[Callable[..., Any]], Any]:
    """Replace `owner.name` by a function that is handed the original as its first argument."""

    def decorate(replacement: Callable[..., Any]) -> Any:
        original = getattr(owner, name)

        def planted(*args: Any, **kwargs: Any) -> Any:
            return replacement(original, *args, **kwargs)

        return mock.patch.object(owner, name, planted)

    return decorate


@contextlib.contextmanager
def model_sees(change: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Let `change` alter what the model gets in every pass."""

    @instead(Target, "forward")
    def planted(forward: Any, self: Any, *args: Any) -> Any:
        model = self._model

        class Changed:
            def __getattr__(self, name: str) -> Any:
                return getattr(model, name)

            def __call__(self, **inputs: Any) -> Any:
                change(inputs)
                return model(**inputs)

        with mock.patch.object(self, "_model", Changed()):
            return forward(self, *args)

    with planted:
        yield


@bug
def siblings_visible() -> Any:
    """A node attends to every node before it."""

    @instead(Draft, "ancestors")
    def planted(ancestors: Any, draft: Draft) -> Any:
        return np.tril(np.ones((len(draft), len(draft)), np.bool_))

    return planted


@bug
def mask_row_skipped() -> Any:
    """The last node attends to itself only."""

    @instead(Draft, "ancestors")
    def planted(ancestors: Any, draft: Draft) -> Any:
        mask = ancestors(draft).copy()
        mask[-1, :-1] = False
        return mask

    return planted


@bug
def parent_hidden() -> Any:
    """A node attends to all its ancestors but its parent."""

    @instead(Draft, "ancestors")
    def planted(ancestors: Any, draft: Draft) -> Any:
        mask = ancestors(draft).copy()
        for node in range(1, len(draft)):
            mask[node, draft.parents[node]] = False
        return mask

    return planted


@bug
def depth_off_by_one() -> Any:
    """Drafted nodes stand one position too far."""

    def change(inputs: dict[str, Any]) -> None:
        inputs["position_ids"][:, 1:] += 1

    return model_sees(change)


@bug
def position_is_node_number() -> Any:
    """Position follows the node's number instead of its depth."""

    def change(inputs: dict[str, Any]) -> None:
        first = inputs["position_ids"][:, :1]
        inputs["position_ids"] = first + torch.arange(inputs["position_ids"].shape[1])

    return model_sees(change)


@bug
def all_positions_shifted() -> Any:
    """Every pass stands one position too far."""

    def change(inputs: dict[str, Any]) -> None:
        inputs["position_ids"] += 1

    return model_sees(change)


@bug
def padding_visible() -> Any:
    """Generated tokens attend to the padding of the prompt."""

    @instead(TreeMask, "__init__")
    def planted(init: Any, self: Any, prompt_mask: Any, *args: Any) -> None:
        init(self, torch.ones_like(prompt_mask), *args)

    return planted


@bug
def wrong_row_kept() -> Any:
    """The cache keeps the row of the node before the accepted one."""

    @instead(TreeCache, "keep")
    def planted(keep: Any, self: Any, paths: Any) -> None:
        keep(self, [[*path[:-1], max(path[-1] - 1, 0)] if path else path for path in paths])

    return planted


@bug
def first_rows_kept() -> Any:
    """The cache keeps the first rows of the pass, whatever the path."""

    @instead(TreeLayer, "keep")
    def planted(keep: Any, self: Any, nodes: Any, count: int) -> None:
        keep(self, None, count)

    return planted


@bug
def values_not_moved() -> Any:
    """The accepted keys are moved into place, their values are not."""

    @instead(TreeLayer, "keep")
    def planted(keep: Any, self: Any, nodes: Any, count: int) -> None:
        values = self._values.clone()
        keep(self, nodes, count)
        self._values.copy_(values)

    return planted


@bug
def holes_visible() -> Any:
    """Rows see the slots that only other rows have kept."""

    @instead(TreeMask, "keep")
    def planted(keep: Any, self: Any, counts: Any, used: int) -> None:
        keep(self, [max(counts)] * len(counts), used)

    return planted


@bug
def realign_moves_wrong_slots() -> Any:
    """Closing holes takes each slot's neighbour."""

    @instead(TreeLayer, "realign")
    def planted(realign: Any, self: Any, slots: Any, start: int, count: int) -> None:
        realign(self, slots.roll(1, -1), start, count)

    return planted


@bug
def realign_forgets_mask() -> Any:
    """Closing holes leaves the mask as it was."""
    return mock.patch.object(TreeMask, "realign", return_value=None)


@bug
def given_back_too_short() -> Any:
    """The user's cache lacks the last token."""

    @instead(TreeCache, "give_back")
    def planted(give_back: Any, self: Any, cache: Any, tokens: int) -> None:
        give_back(self, cache, max(tokens - 1, 0))

    return planted


@bug
def given_back_with_holes() -> Any:
    """The user's cache gets slots in order, holes included."""

    @instead(TreeCache, "give_back")
    def planted(give_back: Any, self: Any, cache: Any, tokens: int) -> None:
        self._slots = [list(range(self.prompt, self.prompt + len(slots))) for slots in self._slots]
        give_back(self, cache, tokens)

    return planted


@bug
def rows_of_fixed_passes_not_moved() -> Any:
    """The accepted rows of a pass of fixed shape stay where they ran."""
    return mock.patch.object(StaticLayer, "move", return_value=None)


@bug
def values_of_fixed_passes_not_moved() -> Any:
    """Only keys are moved together."""

    @instead(StaticLayer, "move")
    def planted(move: Any, self: Any, *args: Any) -> None:
        values = self.values.clone()
        move(self, *args)
        self.values.copy_(values)

    return planted


@bug
def fixed_passes_behind_the_first_row() -> Any:
    """All rows of a batch write behind what the first one has used."""

    @instead(Board, "write")
    def planted(write: Any, self: Any, drafts: Any, positions: Any, used: Any) -> None:
        write(self, drafts, positions, [used[0]] * len(used))

    return planted


@bug
def fixed_windows_without_end() -> Any:
    """Masks of fixed shape let windows of attention reach everywhere."""

    @instead(StaticMasks, "_reached")
    def planted(reached: Any, *args: Any) -> Any:
        return torch.ones_like(reached(*args))

    return planted


@bug
def fixed_masks_show_padding() -> Any:
    """Masks of fixed shape show the padding of a prompt."""

    @instead(Space, "begin")
    def planted(begin: Any, self: Any, cache: Any, prompt: Any) -> None:
        begin(self, cache, None)

    return planted


@bug
def what_was_rejected_stays_in_hidden_slots() -> Any:
    """What overflowed is not cleared before a pass of fixed shape runs again."""
    return mock.patch.object(StaticTarget, "forget_behind", return_value=None)


@bug
def tokens_taken_back_stay_in_fixed_caches() -> Any:
    """A token that a criterion takes back stays in a cache of fixed shape."""
    return mock.patch.object(StaticCache, "drop", return_value=None)


@bug
def larger_cache_starts_at_the_prompt() -> Any:
    """A cache of fixed shape that is full goes on in one that has forgotten what was generated."""

    @instead(StaticCache, "follow")
    def planted(follow: Any, self: Any, other: Any) -> None:
        follow(self, other)
        for layer in self.attention:
            layer.keys[:, :, self.prompt :] = 0

    return planted


@bug
def all_nodes_draw_one_column() -> Any:
    """Nodes of a pass all draw with the noise of the root."""

    @instead(Sampler, "_drawn")
    def planted(drawn: Any, self: Any, scores: Any, columns: Any, depths: Any) -> Any:
        return drawn(self, scores, columns, [depth * 0 for depth in depths])

    return planted


@bug
def one_draw_too_many() -> Any:
    """Every pick draws one more number."""

    @instead(Sampler, "_draw")
    def planted(draw: Any, self: Any, *args: Any) -> Any:
        tokens = draw(self, *args)
        torch.rand(1)
        return tokens

    return planted


@bug
def noise_not_rewound() -> Any:
    """Noise that was drawn ahead and never used stays drawn."""
    return mock.patch.object(NoiseLedger, "rewind", return_value=None)


@bug
def noise_of_another_column() -> Any:
    """A row that runs ahead uses the newest noise instead of its own column's."""

    @instead(NoiseLedger, "noise")
    def planted(noise: Any, self: Any, column: int, vocab: int) -> Any:
        return noise(self, max(column, self._drawn - 1), vocab)

    return planted


@bug
def criterion_draws_late() -> Any:
    """Rows draw ahead though a criterion draws between two columns."""

    @instead(Sampler, "__init__")
    def planted(init: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs | {"ordered": False})

    return planted


@bug
def prefix_off_by_one() -> Any:
    """Processors see one token too few."""

    @instead(Sampler, "pick")
    def planted(pick: Any, self: Any, column: int, nodes: Any, ids: Any) -> Any:
        return pick(self, column, nodes, None if ids is None else ids[:, :-1])

    return planted


@bug
def rows_not_in_step() -> Any:
    """Rows run ahead of each other though a processor looks at all of them."""

    @instead(Sampler, "__init__")
    def planted(init: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.lockstep = False

    return planted


@bug
def greedy_where_sampled() -> Any:
    """The likeliest token is taken where one should be drawn."""

    @instead(Sampler, "_draw")
    def planted(draw: Any, self: Any, column: int, scores: Any, rows: Any) -> Any:
        draw(self, column, scores, rows)
        return scores.argmax(-1)

    return planted


def _asked_once_a_step(keep: Callable[[Stops], Any]) -> Any:
    """Let `keep` blind the stops for all but the last of the columns that settle together."""

    @instead(Progress, "settle")
    def planted(settle: Any, self: Progress) -> set[int]:
        ended: set[int] = set()
        target = min((self.length[row] for row in range(self.rows) if self.runs(row)), default=0)
        while not self.done and self.settled < target:
            with keep(self._stops) if self.settled + 1 < target else contextlib.nullcontext():
                ended |= self._settle_column()
        return ended

    @instead(Decoder, "step")
    def late(step: Any, self: Any) -> Any:
        with mock.patch.object(Progress, "settle", return_value=set()):
            taken = step(self)
        self._progress.settle()
        return taken

    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with planted, late:
            yield

    return both()


@bug
def criteria_asked_once_a_step() -> Any:
    """The user's criteria are asked after the last token of a block only."""
    return _asked_once_a_step(lambda stops: mock.patch.object(stops, "others", []))


@bug
def eos_inside_block_ignored() -> Any:
    """An EOS that is not the last token of a block ends nothing."""

    @instead(Progress, "commit")
    def deaf(commit: Any, self: Progress, row: int, token: int) -> int:
        with mock.patch.object(self._stops, "eos", set()):
            return commit(self, row, token)

    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with deaf, _asked_once_a_step(lambda stops: mock.patch.object(stops, "eos", set())):
            yield

    return both()


@bug
def overrun_kept() -> Any:
    """What a row picked beyond its end stays."""

    @instead(Progress, "_finish")
    def planted(finish: Any, self: Progress, row: int) -> None:
        length = self.length[row]
        finish(self, row)
        self.length[row] = length

    return planted


@bug
def ended_rows_not_padded() -> Any:
    """Rows that have ended go on with tokens instead of padding."""
    return mock.patch.object(Progress, "is_padding", return_value=False)


@bug
def taken_back_tokens_stay_visible() -> Any:
    """Tokens that a criterion took back stay in cache and mask."""
    return mock.patch.object(Target, "drop", return_value=None)


@bug
def scores_of_another_row() -> Any:
    """Returned scores belong to the row above."""

    @instead(Records, "settle")
    def planted(settle: Any, self: Any, column: int) -> None:
        self._open[column] = tuple(table.roll(1, 0) for table in self._open[column])
        settle(self, column)

    return planted


@bug
def streamer_sees_every_block_once() -> Any:
    """The streamer misses a column now and then."""

    @instead(Progress, "_settle_column")
    def planted(settle: Any, self: Progress) -> Any:
        streamer = self._streamer
        with mock.patch.object(self, "_streamer", None if self.settled % 3 == 2 else streamer):
            return settle(self)

    return planted


@bug
def overflow_kept() -> Any:
    """Logits that a guess has turned to NaN are picked from."""

    @instead(Decoder, "_forward")
    def planted(forward: Any, self: Any, drafts: Any, columns: Any) -> Any:
        return drafts, self._sampler.load(self._target.forward(drafts, columns), 8)

    return planted


@bug
def drafter_disturbs_the_generator() -> Any:
    """What a drafter draws is missing from what sampling draws."""
    return mock.patch.object(Sampler, "undisturbed", return_value=contextlib.nullcontext())


# Windows, chunks, states, chains


def _reaching(change: Callable[[dict[str, Any]], None]) -> Any:
    """Let `change` alter what is computed about layers that do not look everywhere."""
    names = ("places", "queries", "first", "ancestors", "used", "sliding", "chunk", "shown")

    @instead(lookahead.mask, "_show")
    def planted(show: Any, *args: Any) -> None:
        given = dict(zip(names, args, strict=True))
        change(given)
        show(*given.values())

    return planted


@bug
def window_too_wide() -> Any:
    """Layers with a window see one token too many."""
    return _reaching(lambda given: given.update(sliding=given["sliding"] and given["sliding"] + 1))


@bug
def window_too_narrow() -> Any:
    """Layers with a window see one token too few."""
    return _reaching(lambda given: given.update(sliding=given["sliding"] and given["sliding"] - 1))


@bug
def window_counts_slots() -> Any:
    """Windows end so many slots back, be there tokens of the row in them or holes."""

    def change(given: dict[str, Any]) -> None:
        places = given["places"].copy()
        prompt = (given["queries"][:, 0] - (places >= 0).sum(1)).max()
        for row in places[:, max(prompt, 0) :]:
            row[row >= 0] = max(prompt, 0) + np.flatnonzero(row >= 0)
        given["places"] = places

    return _reaching(change)


@bug
def chunks_counted_from_slot_0() -> Any:
    """Chunks begin with the padding."""
    return _reaching(lambda given: given.update(first=np.zeros_like(given["first"])))


@bug
def all_layers_look_everywhere() -> Any:
    """Layers with a window get the mask of those without."""
    return _reaching(lambda given: given.update(sliding=0, chunk=0))


@bug
def window_given_back_too_long() -> Any:
    """The user's cache keeps all positions in layers with a window."""

    @instead(lookahead.cache, "fill")
    def planted(fill: Any, layer: Any, keys: Any, values: Any) -> None:
        fill(layer, keys, values)
        layer.keys, layer.values = keys, values

    return planted


@bug
def recorded_pass_writes_one_slot_early() -> Any:
    """A recorded pass is told that it sees a slot less than it does."""

    @instead(Script, "run")
    def planted(run: Any, self: Any, tokens: Any, positions: Any, mask: Any, cache: Any) -> Any:
        if mask is None:
            return run(self, tokens, positions, mask, cache)
        cut = {name: one[..., 1:] for name, one in mask.items()} if isinstance(mask, dict) else mask[..., 1:]
        for layer in cache.attention:
            layer.used -= 1
        try:
            return run(self, tokens, positions, cut, cache)
        finally:
            for layer in cache.attention:
                layer.used += 1

    return planted


@bug
def recorded_pass_writes_to_buffers_that_were_left() -> Any:
    """Where a cache has grown, recorded passes go on with the buffers that it had before."""

    @instead(TreeCache, "buffers")
    def planted(buffers: Any, self: Any, nodes: int) -> Any:
        if not hasattr(self, "first"):
            self.first = [one.clone() for one in buffers(self, 64)]
        return self.first

    return planted


@bug
def recorded_prompt_leaves_places_behind() -> Any:
    """The cache of a recorded prompt begins with its second token."""

    @instead(Script, "prefill")
    def planted(prefill: Any, self: Any, tokens: Any, positions: Any, cache: Any, layers: Any) -> Any:
        logits = prefill(self, tokens, positions, cache, layers)
        for layer in cache.layers:
            layer.keys[:, :, 0], layer.values[:, :, 0] = layer.keys[:, :, 1], layer.values[:, :, 1]
        return logits

    return planted


@bug
def recorded_pass_confuses_masks() -> Any:
    """Kinds of layers take each other's masks."""

    @instead(Script, "run")
    def planted(run: Any, self: Any, tokens: Any, positions: Any, mask: Any, cache: Any) -> Any:
        mixed = dict(zip(mask, reversed(mask.values()), strict=True)) if isinstance(mask, dict) else mask
        return run(self, tokens, positions, mixed, cache)

    return planted


@bug
def recording_of_another_batch_size() -> Any:
    """Passes of padded rows run with places counted as for the first row."""

    @instead(Script, "run")
    def planted(run: Any, self: Any, tokens: Any, positions: Any, mask: Any, cache: Any) -> Any:
        return run(self, tokens, positions[:1].expand_as(positions), mask, cache)

    return planted


@bug
def state_not_put_back() -> Any:
    """States keep the tokens of a draft that were rejected."""

    @instead(StateCache, "_undo")
    def planted(undo: Any, self: Any) -> None:
        self._before = [({}, length) for _, length in self._before]
        undo(self)

    return planted


@bug
def pending_forgotten() -> Any:
    """What was accepted before a rejected token never runs again."""

    @instead(StateCache, "keep")
    def planted(keep: Any, self: Any, kept: Any) -> None:
        keep(self, kept)
        self._seen += self.pending.shape[1]
        self.pending = self.pending[:, :0]

    return planted


@bug
def pending_all_at_one_place() -> Any:
    """Pending tokens run at the position of what comes behind them."""

    def planted(inputs: Any, pending: Any) -> Any:
        places = inputs[1, :, :1].repeat(pending.shape[1], 1)
        return np.concatenate([np.stack([pending, places]), inputs], axis=2)

    return mock.patch.object(Target, "_with_pending", staticmethod(planted))


@bug
def logits_of_pending_tokens() -> Any:
    """The logits are those of the first tokens that ran, which are pending ones."""

    @instead(Target, "forward")
    def planted(forward: Any, self: Any, drafts: Any, columns: Any) -> Any:
        size = max(len(draft) for draft in drafts)
        model = self._model

        class Shifted:
            def __getattr__(self, name: str) -> Any:
                return getattr(model, name)

            def __call__(self, **inputs: Any) -> Any:
                outputs = model(**inputs)
                behind = outputs.logits.shape[1] - size
                outputs.logits = outputs.logits.roll(behind, 1)
                return outputs

        with mock.patch.object(self, "_model", Shifted()):
            return forward(self, drafts, columns)

    return planted


@bug
def rows_of_chains_not_in_step() -> Any:
    """Rows run ahead of each other though the model has all of them go on together."""

    @instead(Sampler, "__init__")
    def planted(init: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs | {"together": False})

    return planted


@bug
def trees_where_chains_run() -> Any:
    """A tree runs as if it was a chain."""

    @instead(Draft, "spine")
    def planted(spine: Any, draft: Draft, last: int | None = None) -> Draft:
        return draft

    return planted


@pytest.fixture(scope="module", autouse=True)
def verdicts() -> None:
    """Models are judged before anything is planted: what is found out about them is kept."""
    for case in BATTERY:
        supports(model_of(case))


def caught(check: Callable[[Case], Any] = assert_exact) -> Exception | None:
    """Return how the first case of the battery that fails `check` fails, or None."""
    for case in BATTERY:
        try:
            check(case)
        except Exception as error:
            return error
    return None


def test_nothing_is_caught_where_nothing_is_planted() -> None:
    error = caught()
    if error is not None:
        raise error


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name: str) -> None:
    with BUGS[name]():
        error = caught()
    assert error is not None, f"nobody noticed: {BUGS[name].__doc__}"
    print(f"{name}: {type(error).__name__}: {str(error).splitlines()[:2]}")


# What cannot change the output is caught by the law of steps. Criteria may take back what a step has reported.


def steps_fit(case: Case) -> None:
    if not (case.criteria or case.stop_strings):
        assert_steps_fit(case)


def test_steps_fit_where_nothing_is_planted() -> None:
    error = caught(steps_fit)
    if error is not None:
        raise error


def test_accepted_probe_is_caught() -> None:
    def child(draft: Draft, node: int, token: int) -> int | None:
        found = (i for i in range(node + 1, len(draft)) if draft.parents[i] == node and draft.tokens[i] == token)
        return next(found, None)

    with mock.patch.object(Draft, "child", child):
        assert "probe" in str(caught(steps_fit))


def test_stale_context_is_caught() -> None:
    view = Contexts.view

    def stale(self: Contexts, row: int, columns: int) -> Any:
        context = view(self, row, columns).copy()
        context[-2:-1] = 3
        return context

    with mock.patch.object(Contexts, "view", stale):
        assert "context" in str(caught(steps_fit))


def test_draft_over_budget_is_caught() -> None:
    with instead(Draft, "cut")(lambda cut, draft, nodes, depth=None: cut(draft, nodes + 2, depth=depth)):
        assert "more nodes than the budget" in str(caught(steps_fit))


def test_unobserved_step_is_caught() -> None:
    @instead(Decoder, "_learn")
    def planted(learn: Any, self: Any, *args: Any) -> None:
        learn(self, *args)
        for drafter in self._drafters:
            drafter.steps[1:2] = []

    with planted:
        assert caught(steps_fit) is not None
