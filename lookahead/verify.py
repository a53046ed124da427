"""The walk: from the root of each tree, pick as plain `generate()` picks, and descend while the draft agrees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit

from lookahead.draft import Draft, IntArray
from lookahead.progress import Progress
from lookahead.sampling import Sampler


def walk(drafts: Sequence[Draft], sampler: Sampler, progress: Progress) -> list[list[int]]:
    """Commit what the model picks on its way down each tree; return the visited nodes of each row, the root first.

    Rows are visited in the order of their columns, so that a column settles, and its stopping criteria are asked, as
    soon as every row has it. The draft is a fixed token, hence picking and comparing is speculative sampling for point
    drafts (Leviathan et al. 2023; Chen et al. 2023), with the very draws of plain sampling.
    """
    if sampler.direct and sampler.sound and progress.takes_runs:
        path = _run_down(drafts[0], sampler.picks[0], progress)
        sampler.release(progress.settled)
        return [path]
    if sampler.obeys and progress.takes_runs:
        return [_obey_down(drafts[0], sampler, progress)]
    paths: list[list[int]] = [[] for _ in drafts]
    nodes = {row: 0 for row in range(len(drafts)) if progress.is_open(row)}
    while nodes and not progress.done:
        if sampler.lockstep and len(nodes) < sum(progress.runs(row) for row in range(progress.rows)):
            break
        column = min(progress.length[row] for row in nodes)
        group = {row: node for row, node in nodes.items() if progress.length[row] == column}
        try:
            picked = sampler.pick(column, group, progress.ids(column) if sampler.needs_ids else None)
        except Exception:
            if column == progress.settled:
                raise
            # Plain generate() may end these rows before it gets here; they wait for the others, and then it counts.
            nodes = {row: node for row, node in nodes.items() if row not in group}
            continue
        for row, token in picked.items():
            paths[row].append(nodes[row])
            picked[row] = progress.commit(row, token)
        ended = progress.settle()
        sampler.release(progress.settled)
        for row, token in picked.items():
            child = drafts[row].child(nodes[row], token) if progress.is_open(row) else None
            nodes[row] = -1 if child is None else child
        nodes = {row: node for row, node in nodes.items() if node >= 0 and row not in ended}
    return paths


def _run_down(draft: Draft, picks: IntArray, progress: Progress) -> list[int]:
    """Walk down one tree by the picks of its nodes, and commit all at once."""
    nodes, tokens = np.empty(len(draft), np.int32), np.empty(len(draft), np.int64)
    count = descend(draft.tokens, draft.parents, draft.probe, picks, nodes, tokens)
    return nodes[: progress.commit_run(tokens[:count])].tolist()  # type: ignore[no-any-return]


def _obey_down(draft: Draft, sampler: Sampler, progress: Progress) -> list[int]:
    """Walk down one tree by what a grammar allows of the logits of its nodes, and commit all at once."""
    matcher = sampler.grammars[0].matcher(0)
    assert matcher is not None
    path: list[int] = []
    picked: list[int] = []
    try:
        node: int | None = 0
        state = matcher.follow(progress.new_tokens(0, 0).astype(np.int32))
        while node is not None:
            picked.append(sampler.best_allowed(0, node, matcher.mask(state)))
            path.append(node)
            if not progress.goes_on(picked):
                break
            node, state = draft.child(node, picked[-1]), matcher.child(state, picked[-1])
    finally:  # what was picked before something failed stands, as it does where tokens are picked one by one
        progress.commit_run(np.array(picked, np.int64))
    return path


@njit(cache=True)
def descend(tokens, parents, probe, picks, nodes, picked):  # type: ignore[no-untyped-def]
    """Write the visited nodes, the root first, and what was picked at each; return how many there are."""
    count, at, found = 0, 0, True
    while found:
        nodes[count], picked[count] = at, picks[at]
        count += 1
        found = False
        for i in range(at + 1, tokens.shape[0]):
            if parents[i] == at and tokens[i] == picks[at] and not probe[i]:
                at, found = i, True
                break
    return count
