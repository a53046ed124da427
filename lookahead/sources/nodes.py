"""Nodes of token trees, found by what they hold."""

from __future__ import annotations

from lookahead.sources.kernels import inner, kernel


@inner
def find_child(tokens, parents, used, above, token):  # type: ignore[no-untyped-def]
    """Return the child of `above` that holds `token`, among the first `used` nodes; -1: there is none."""
    for node in range(above + 1, used):
        if parents[node] == above and tokens[node] == token:
            return node
    return -1


@kernel
def find_nodes(tokens, parents, in_tokens, in_parents, place):  # type: ignore[no-untyped-def]
    """Fill `place` with the node of another tree that each node of a tree is; -1: it is not there.

    The roots are the same; no two children of a node hold the same token.
    """
    place[0] = 0
    for i in range(1, tokens.shape[0]):
        above = place[parents[i]]
        place[i] = find_child(in_tokens, in_parents, in_tokens.shape[0], above, tokens[i]) if above >= 0 else -1
