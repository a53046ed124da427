"""Drafters that drive the verifier where guessing alone would seldom go."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lookahead.draft import Draft
from lookahead.drafter import Drafter
from lookahead.trace import Step


class Oracle(Drafter):
    """Knows the answer and proposes it, with errors, wrong siblings and probes mixed in.

    Args:
        answers: the tokens that each row will generate.
        error: chance that a node on the main path is wrong.
        branch: chance of a wrong sibling before a node, and again of one behind it.
        probe: chance that the right token also stands there as a probe, with a child of its own.
        relay: so many rows take turns, and only one of them drafts in a pass; that makes holes.
        wrong: the token of all errors; None: any.
    """

    def __init__(
        self,
        answers: Sequence[Sequence[int]],
        vocab: int,
        *,
        error: float = 0.1,
        branch: float = 0.3,
        probe: float = 0.1,
        seed: int = 0,
        relay: int = 1,
        wrong: int | None = None,
    ) -> None:
        self.answers, self.vocab, self.seed = answers, vocab, seed
        self.error, self.branch, self.probe, self.relay = error, branch, probe, relay
        self.rows, self.wrong = 0, wrong

    def start(self, context: Any) -> Drafter:
        self.rows += 1
        return OracleRow(self, (self.rows - 1) % len(self.answers), len(context))

    def propose(self, context: Any, budget: int) -> Draft:
        raise AssertionError("propose() belongs to the object that start() returns")


class OracleRow(Drafter):
    """The oracle of one row."""

    def __init__(self, oracle: Oracle, row: int, prompt: int) -> None:
        self.oracle, self.row, self.prompt, self.passes = oracle, row, prompt, row
        self._dice = random.Random(f"{oracle.seed}/{row}")

    def propose(self, context: Any, budget: int) -> Draft:
        oracle, chance = self.oracle, self._dice.random
        torch.rand(2)  # what a drafter draws is nobody else's business
        tokens, parents, probes = [int(context[-1])], [-1], [False]
        self.passes += 1
        if self.passes % oracle.relay:
            return Draft.root(tokens[0])

        def add(token: int, parent: int, probe: bool = False) -> int:
            tokens.append(token)
            parents.append(parent)
            probes.append(probe)
            return len(tokens) - 1

        last = 0
        for right in oracle.answers[self.row][len(context) - self.prompt :]:
            if len(tokens) > budget:
                break
            wrong = self._wrong()
            if chance() < oracle.branch:
                add(wrong, last)
            if chance() < oracle.probe:
                add(self._dice.randrange(oracle.vocab), add(right, last, probe=True))
            node = add(wrong if chance() < oracle.error else right, last)
            if chance() < oracle.branch:
                add(self._wrong(), last)
            last = node
        return Draft(np.array(tokens), np.array(parents), probe=np.array(probes))

    def observe(self, step: Step) -> None:
        torch.rand(1)

    def _wrong(self) -> int:
        return self._dice.randrange(self.oracle.vocab) if self.oracle.wrong is None else self.oracle.wrong


class Adversary(Drafter):
    """Random trees: deep, wide, too many nodes, equal siblings, probes, weights of zero; right tokens among them."""

    def __init__(self, answers: Sequence[Sequence[int]], vocab: int, *, seed: int = 0) -> None:
        self.answers, self.vocab, self.seed = answers, vocab, seed
        self.rows = 0

    def start(self, context: Any) -> Drafter:
        self.rows += 1
        return AdversaryRow(self, (self.rows - 1) % len(self.answers), len(context))

    def propose(self, context: Any, budget: int) -> Draft:
        raise AssertionError("propose() belongs to the object that start() returns")


class AdversaryRow(Drafter):
    """The adversary of one row."""

    def __init__(self, adversary: Adversary, row: int, prompt: int) -> None:
        self.adversary, self.row, self.prompt = adversary, row, prompt
        self._dice = random.Random(f"{adversary.seed}/{row}")

    def propose(self, context: Any, budget: int) -> Draft:
        draw, deep = self._dice, self._dice.random()
        rest = self.adversary.answers[self.row][len(context) - self.prompt :]
        size = 1 + draw.randrange(2 * budget + 2)
        tokens, parents, depth = [int(context[-1])], [-1], [0]
        for i in range(1, size):
            parent = i - 1 if draw.random() < deep else draw.randrange(i)
            right = rest[depth[parent]] if depth[parent] < len(rest) else 0
            token = right if draw.random() < 0.5 else draw.randrange(min(8, self.adversary.vocab))
            tokens.append(token)
            parents.append(parent)
            depth.append(depth[parent] + 1)
        weight = [draw.choice((0.0, draw.random(), 1.0)) for _ in tokens]
        probe = [i > 0 and draw.random() < 0.15 for i in range(size)]
        return Draft(np.array(tokens), np.array(parents), weight=np.array(weight), probe=np.array(probe))
