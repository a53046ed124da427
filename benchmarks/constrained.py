"""Recorded JSON replayed under the grammar of its schema, and drafters that are pruned by it.

A value is written again as the grammar of `Grammar.json_schema` writes it: on one line, with ", " and ": ", the
properties of every object in the order of its schema, then those that are only required, then all others as recorded.
Needs `jsonschema` to tell which branch of an `anyOf` or `oneOf` a value took.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from peers import PEERS, Contender
from recorded import BadInput, Request, lines, parse
from tokenizers import Tokenizer

from lookahead.draft import Draft, IntArray
from lookahead.drafter import Drafter
from lookahead.errors import GrammarError
from lookahead.grammar.grammar import Grammar, compiled
from lookahead.grammar.matcher import ENDED, Matcher
from lookahead.grammar.vocabulary import Vocabulary
from lookahead.trace import Step

Parts = list[dict[str, Any]]  # schemas that hold for one value at once

_REFERENCES = 32  # deeper ones go in circles


@dataclass(frozen=True, slots=True)
class Constrained(Request):
    """A request whose output follows a grammar."""

    grammar: Grammar
    vocabulary: Vocabulary

    def matcher(self) -> Clocked:
        """Return what follows the output; the end token is one that no text holds."""
        end = self.vocabulary.size
        return Clocked(compiled(self.grammar, self.vocabulary), [end], end + 1)


def _clocked(name: str) -> Callable[..., Any]:
    method = getattr(Matcher, name)

    def timed(self: Clocked, *args: Any) -> Any:
        if self.running:
            return method(self, *args)
        self.running, begin = True, time.thread_time()
        try:
            return method(self, *args)
        finally:
            self.seconds += time.thread_time() - begin
            self.running = False

    return timed


class Clocked(Matcher):
    """A matcher that knows how long it was at work.

    Attributes:
        seconds: of this thread on the CPU, spent in what may move the engine or compute a mask.
    """

    def __init__(self, *args: Any) -> None:
        self.seconds, self.running = 0.0, False
        super().__init__(*args)

    child, enter, enter_at, mask, prune, settle = map(
        _clocked, ("child", "enter", "enter_at", "mask", "prune", "settle")
    )


# Requests


def load(
    path: Path, tokenizer: Tokenizer, workloads: list[str], limit: int | None
) -> tuple[list[Request], Counter[str]]:
    """Return the requests with a schema, at most `limit` of each workload, and why how many others were left out.

    Raises:
        BadInput: a bad line, or nothing to replay.
    """
    vocabulary = Vocabulary.of(tokenizer)
    requests: list[Request] = []
    taken, skipped = Counter[str](), Counter[str]()
    for line, where in lines(path):
        workload, prompt, output = parse(line, where)
        schema = json.loads(line).get("schema")
        if schema is None or (workloads and workload not in workloads) or taken[workload] == limit:
            continue
        try:
            text = arranged(json.loads(output), schema)
            encoded = [tokenizer.encode(t, add_special_tokens=False).ids for t in (prompt, text)]
            tokens = (np.array(ids, np.int32) for ids in encoded)
            request = Constrained(workload, *tokens, _grammar(schema), vocabulary)
            _check_allowed(request)
        except Skip as reason:
            skipped[f"{workload}: {reason}"] += 1
            continue
        except ValueError as error:
            raise BadInput(f"{where}: `output` is no JSON ({error})") from None
        taken[workload] += 1
        requests.append(request)
    if not requests:
        raise BadInput(f"{path} has no request whose `output` its `schema` allows ({skipped.total()} skipped)")
    return requests, skipped


def short(tokenizer: Tokenizer) -> Constrained:
    """Return a request that is over soon."""
    vocabulary = Vocabulary.of(tokenizer)
    tokens = np.array(vocabulary.encode("[1, 2, true]"), np.int32)
    return Constrained("", tokens, tokens, Grammar.json_schema({"type": "array"}), vocabulary)


class Skip(Exception):
    """A request that cannot be replayed under its grammar; the message is the reason to count it under."""


def _grammar(schema: Any) -> Grammar:
    try:
        return Grammar.json_schema(schema)
    except GrammarError as error:
        raise Skip(f"does not compile: {str(error).partition(';')[0]}") from None


def _check_allowed(request: Constrained) -> None:
    """Raise `Skip` unless the grammar's masks allow the output token by token, and the end after it."""
    if not (len(request.prompt) and len(request.output)):
        raise Skip("empty prompt or output")
    try:
        matcher = request.matcher()
        state = matcher.root
        for token in request.output.tolist():
            if not matcher.allows(state, token):
                raise Skip("the masks do not allow the value")
            state = matcher.child(state, token)
        if not matcher.accepts(state):
            raise Skip("the grammar does not allow the value to end")
        matcher.close()
    except GrammarError as error:
        raise Skip(f"the engine gives up: {error}") from None


# The value, written again


def arranged(value: Any, schema: Any) -> str:
    """Return `value` as JSON on one line, properties in the order of `schema`."""
    return json.dumps(Order(schema).arrange(value, [schema]), ensure_ascii=False)


class Order:
    """In which order the grammar of one schema wants the properties of every object."""

    def __init__(self, schema: Any) -> None:
        from jsonschema.validators import validator_for

        self._root = schema
        self._validator = validator_for(schema)(schema)

    def arrange(self, value: Any, schemas: list[Any]) -> Any:
        """Return `value`, which all `schemas` hold for, in order."""
        parts = [part for schema in schemas for part in self._parts(schema, value, 0)]
        if isinstance(value, dict):
            return {key: self.arrange(value[key], _below(parts, key)) for key in _keys(parts, value)}
        if isinstance(value, list):
            return [self.arrange(item, _items(parts, i)) for i, item in enumerate(value)]
        return value

    def _parts(self, schema: Any, value: Any, depth: int) -> Iterator[dict[str, Any]]:
        """Yield what holds for `value`, in the order in which `schema` names it: as its keywords stand."""
        if not isinstance(schema, dict) or depth == _REFERENCES:
            return
        for keyword, inner in schema.items():
            if keyword == "$ref":
                yield from self._parts(self._target(inner), value, depth + 1)
            elif keyword == "allOf":
                for one in inner:
                    yield from self._parts(one, value, depth + 1)
            elif keyword in ("anyOf", "oneOf"):
                yield from self._parts(self._branch(inner, value), value, depth + 1)
            else:
                yield {keyword: inner}

    def _target(self, reference: str) -> Any:
        """Return what a reference within the schema points at; None for others."""
        found = self._root
        if not reference.startswith("#"):
            return None
        for step in reference[1:].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(step)] if isinstance(found, list) else found[step]
            except (KeyError, IndexError, ValueError, TypeError):
                return None
        return found

    def _branch(self, branches: list[Any], value: Any) -> Any:
        from jsonschema.exceptions import ValidationError
        from referencing.exceptions import Unresolvable

        for branch in branches:
            try:
                self._validator.evolve(schema=branch).validate(value)
                return branch
            except (ValidationError, Unresolvable):
                continue
        return None


def _keys(parts: Parts, value: dict[str, Any]) -> list[str]:
    named = [key for part in parts for key in part.get("properties", ())]
    needed = [key for part in parts for key in part.get("required", ()) if isinstance(part["required"], list)]
    return [key for key in dict.fromkeys([*named, *needed, *value]) if key in value]


def _below(parts: Parts, key: str) -> list[Any]:
    """Return the schemas of the property `key`."""
    found = [part["properties"][key] for part in parts if key in part.get("properties", ())]
    patterns = [item for part in parts for item in part.get("patternProperties", {}).items()]
    found += [schema for pattern, schema in patterns if re.search(pattern, key)]
    return found or [part["additionalProperties"] for part in parts if "additionalProperties" in part]


def _items(parts: Parts, i: int) -> list[Any]:
    """Return the schemas of item `i` of an array."""
    found = []
    for part in parts:
        first = part.get("prefixItems", part.get("items"))
        if isinstance(first, list):
            found += first[i : i + 1]
        elif first is not None:
            found.append(first)
    return found


# Drafters


class Pruned(Drafter):
    """A row whose drafts lose what the grammar forbids."""

    def __init__(self, row: Drafter) -> None:
        self._row = row

    def obey(self, matcher: Matcher) -> bool:
        self._matcher = matcher
        return True

    def propose(self, context: IntArray, budget: int) -> Draft:
        return self._matcher.prune(self._row.propose(context, budget))

    def observe(self, step: Step) -> None:
        self._row.observe(step)


class Forced(Pruned):
    """A row that drafts under the tokens that alone are allowed, and has such tokens follow what it drafts."""

    def propose(self, context: IntArray, budget: int) -> Draft:
        matcher = self._matcher
        chain = self._forced(matcher.root, budget)
        context = np.concatenate([context, np.array(chain, np.int32)])
        under = self._row.propose(context, budget - len(chain))
        tokens = np.concatenate([context[-len(chain) - 1 :], under.tokens[1:]])
        parents = np.concatenate([np.arange(-1, len(chain)), under.parents[1:] + len(chain)])
        return self._prolonged(matcher.prune(Draft(tokens, parents.astype(np.int32))), budget)

    def _prolonged(self, draft: Draft, budget: int) -> Draft:
        """Return `draft` with what is forced after its leaves, as long as there are nodes left."""
        tokens, parents, states = draft.tokens.tolist(), draft.parents.tolist(), [self._matcher.root]
        for node in range(1, len(draft)):
            states.append(self._matcher.child(states[parents[node]], tokens[node]))
        for leaf in sorted(set(range(len(draft))) - set(parents)):
            chain = self._forced(states[leaf], budget + 1 - len(tokens))
            parents += [leaf, *range(len(tokens), len(tokens) + len(chain))][: len(chain)]
            tokens += chain
        return Draft(np.array(tokens, np.int32), np.array(parents, np.int32))

    def _forced(self, state: int, most: int) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < most and (token := only(self._matcher.mask(state))) is not None:
            state = self._matcher.child(state, token)
            if state == ENDED:
                break
            tokens.append(token)
        return tokens


class Blind(Drafter):
    """A row that is told of no grammar."""

    def __init__(self, row: Drafter) -> None:
        self._row = row

    def propose(self, context: IntArray, budget: int) -> Draft:
        return self._row.propose(context, budget)

    def observe(self, step: Step) -> None:
        self._row.observe(step)


class Behind(Contender):
    """A contender, each of its rows behind `wrap`."""

    def __init__(self, make: Callable[[], Contender], wrap: Callable[[Drafter], Drafter]) -> None:
        self._inner, self._wrap = make(), wrap
        self.settings = self._inner.settings

    def start(self, context: IntArray) -> Drafter:
        return self._wrap(self._inner.start(context))

    def propose(self, context: IntArray, budget: int) -> Draft:
        return self._inner.propose(context, budget)

    def finish(self, text: IntArray) -> None:
        self._inner.finish(text)


def peers(nothing: Callable[[], Contender]) -> dict[str, Callable[[], Contender]]:
    """Return how to make the peers, blind, pruned and under forced tokens; those alone stand before `nothing`."""
    pruned = {f"{name} + grammar": partial(Behind, make, Pruned) for name, make in PEERS.items()}
    forced = partial(Behind, PEERS["arctic_tree_global"], Forced)
    return {
        "forced_chain": partial(Behind, nothing, Forced),
        **PEERS,
        **pruned,
        "forced_chain + arctic_tree_global": forced,
    }


def only(mask: Any) -> int | None:
    """Return the token that a mask allows if it is the only one.

    >>> only(np.array([0, 4], np.uint32))
    34
    """
    (used,) = mask.nonzero()
    if len(used) != 1:
        return None
    word = int(mask[used[0]])
    return 32 * int(used[0]) + word.bit_length() - 1 if word.bit_count() == 1 else None
