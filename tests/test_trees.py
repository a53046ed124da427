"""Laws of the trees and texts of a run: they are what ran, what was proposed, and what came out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import PAD, VOCAB, tiny
from transformers import AutoTokenizer

import lookahead
from lookahead import Draft, Jacobi, Lookahead, Run
from lookahead.testing import Oracle
from lookahead.trees import Grown, Tree
from lookahead.wording import pieces, word


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    """Any draft without equal siblings."""
    size = draw(st.integers(1, 12))
    parents = [-1, *(draw(st.integers(0, i - 1)) for i in range(1, size))]
    tokens = [draw(st.integers(0, 5)) for _ in range(size)]
    chances = [round(draw(st.floats(0, 1, width=32)), 3) for _ in range(size)]
    sources, probes = ([draw(st.integers(0, 5)) for _ in range(size)], [draw(st.booleans()) for _ in range(size)])
    return Draft(tokens, parents, chances, sources, [False, *probes[1:]]).deduplicate()


def named(tokens: Any, parents: Any, probes: Any) -> list[tuple[Any, ...]]:
    """Each node by the tokens on its path, and whether it or one above it is a probe."""
    names: list[tuple[Any, ...]] = []
    for i, parent in enumerate(parents):
        above = names[parent] if parent >= 0 else ()
        names.append((*above, (tokens[i], bool(probes[i]))))
    return names


@given(drafts(), st.integers(0, 12))
def test_pruned_nodes_stand_behind_those_that_ran(offered: Draft, nodes: int) -> None:
    ran = offered.cut(nodes)
    (tree,) = Grown([(3, offered, ran, [0])]) or (None,)
    if tree is None:
        assert len(offered) == 1
        return
    assert (tree.row, tree.ran, tree.path) == (3, len(ran), (0,))
    assert list(tree.tokens[: tree.ran]) == ran.tokens.tolist()
    assert list(tree.parents[: tree.ran]) == ran.parents.tolist()
    assert list(tree.probes) == [i for i in range(len(ran)) if ran.probe[i]]
    whole = named(offered.tokens.tolist(), offered.parents.tolist(), offered.probe.tolist())
    pruned = set(range(tree.ran, len(tree.tokens)))
    shown = named(tree.tokens, tree.parents, [False] * len(tree.tokens))
    assert sorted(tuple(t for t, _ in name) for name in whole) == sorted(tuple(t for t, _ in name) for name in shown)
    chances = {name: offered.weight.tolist()[i] for i, name in enumerate(whole)}
    for i in pruned:
        assert tree.chances[i] in [c for name, c in chances.items() if [t for t, _ in name] == [t for t, _ in shown[i]]]


@given(drafts())
def test_a_draft_that_ran_whole_is_kept_once(draft: Draft) -> None:
    once, again = Grown([(0, draft, draft, [0])]), Grown([(0, draft, draft.cut(12), (0,))])
    assert once == again == tuple(once)
    assert list(once) == list(once[:])
    assert all(len(tree.tokens) == tree.ran == len(draft) for tree in once)


@pytest.mark.parametrize("columns", [{"ran": 2}, {"parents": (0,)}, {"path": (1,)}, {"probes": (0,)}, {"tokens": ()}])
def test_trees_that_are_none_are_refused(columns: dict[str, Any]) -> None:
    good = {"row": 0, "ran": 1, "tokens": (4,), "parents": (-1,), "chances": (1.0,), "sources": (0,)}
    with pytest.raises(ValueError, match="a tree whose"):
        Tree(**good | {"probes": (), "path": ()} | columns)


# -- of real runs -----------------------------------------------------------------------------------------------------


def spans(run: Run) -> None:
    """Assert that first tokens and what every pass committed are the outputs, and that trees show how."""
    for row, output in enumerate(run.outputs):
        at = 1
        for one in run.passes:
            tokens = list(output[at : at + one.committed[row]])
            for tree in [tree for tree in one.trees if tree.row == row]:
                accepted = [tree.tokens[node] for node in tree.path[1:]]
                assert tree.tokens[0] == output[at - 1]
                assert accepted[: len(tokens)] == tokens[: len(accepted)]
                assert not set(tree.path) & set(tree.probes)
            at += one.committed[row]
        assert at >= len(output)
    for one in run.passes:
        assert one.nodes == max([tree.ran for tree in one.trees], default=1)
        for name, share in one.sources.items():
            codes = [tree.sources[i] for tree in one.trees for i in range(1, tree.ran)]
            assert name in ("grammar", "pool", "jacobi") or share.run <= len(codes)
        assert sum(share.run for share in one.sources.values()) == sum(tree.ran - 1 for tree in one.trees)
        assert sum(share.accepted for share in one.sources.values()) == sum(
            max(len(tree.path) - 1, 0) for tree in one.trees
        )


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("nodes", [2, 12])
def test_trees_tell_how_the_text_came(rows: int, sample: bool, nodes: int) -> None:
    model = tiny("llama", "sdpa", "float64")
    ids = torch.randint(8, VOCAB, (rows, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[-1, :2], ids[-1, :2] = 0, PAD
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 24, "do_sample": sample}
    torch.manual_seed(5)
    plain = model.generate(**arguments)
    oracle = Oracle(plain[:, 7:].tolist(), VOCAB, error=0.2, seed=1)
    la = Lookahead(model, drafter=oracle, nodes=nodes)
    torch.manual_seed(5)
    assert torch.equal(la.generate(**arguments), plain)
    run = la.last_trace
    assert run is la.last
    assert run is not None
    assert [list(row) for row in run.outputs] == plain[:, 7:].tolist()
    assert [list(row) for row in run.prompts] == [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)]
    assert nodes > 2 or any(tree.ran < len(tree.tokens) for one in run.passes for tree in one.trees)
    assert run.seconds > run.prefill_s > 0
    spans(run)


def test_probes_of_a_window_are_told() -> None:
    model = tiny("llama", "sdpa", "float64")
    la = Lookahead(model, sources=("recycle", Jacobi(window=4, ngram=3, verify=3, switch="on")), nodes=6)
    la.generate(torch.arange(8, 16)[None], max_new_tokens=24, do_sample=False)
    assert la.last is not None
    assert any(tree.probes for one in la.last.passes for tree in one.trees)
    spans(la.last)


def test_a_call_without_a_tokenizer_has_no_wording() -> None:
    la = Lookahead(tiny("llama", "sdpa", "float64"))
    la.generate(torch.arange(8, 16)[None], max_new_tokens=4, do_sample=False)
    assert la.last is not None
    assert la.last.worded() is la.last
    assert la.last.wording is None


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> Any:
    return AutoTokenizer.from_pretrained(lookahead.demo_path())


def test_the_wording_is_the_text(demo: Any) -> None:
    model = tiny("llama", "sdpa", "float64", vocab_size=len(demo))
    la = Lookahead(model)
    ids = demo("def add(a, b):\n    return é", return_tensors="pt").input_ids
    out = la.generate(ids, max_new_tokens=40, do_sample=False, tokenizer=demo)
    assert la.last is not None
    run = la.last.worded()
    assert run.wording is not None
    assert run.wording.prompts == (demo.decode(ids[0]),)
    assert "".join(run.wording.outputs[0]) == demo.decode(out[0, ids.shape[1] :])
    drafted = {token for one in run.passes for tree in one.trees for token in tree.tokens}
    assert set(run.wording.words) == drafted | set(run.outputs[0])
    assert run.worded() is run


@given(st.data())
def test_pieces_join_to_the_text(demo: Any, data: st.DataObject) -> None:
    written = st.text(max_size=12).map(lambda text: demo.encode(text, add_special_tokens=False))
    tokens = data.draw(written | st.lists(st.integers(0, len(demo) - 1), max_size=24))
    found = pieces(demo, tokens)
    assert len(found) == len(tokens)
    assert "".join(found) == demo.decode(tokens, clean_up_tokenization_spaces=False)


def test_words_show_bytes_and_special_tokens(demo: Any) -> None:
    parts = demo.encode("é☃", add_special_tokens=False)
    said = [word(demo, token) for token in parts]
    assert all("\ufffd" not in text for text in said)
    assert all(
        text.startswith("<") == ("\ufffd" in demo.decode([token])) for text, token in zip(said, parts, strict=True)
    )
    assert word(demo, demo.eos_token_id) == demo.eos_token
    assert word(demo, 10**6) == "<1000000>"
    assert list(itertools.accumulate(pieces(demo, parts)))[-1] == "é☃"
