"""Laws of the pools of a `Lookahead`: what is added to them, what is refused, and that outputs never suffer."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from models import PAD, VOCAB, tiny, tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import lookahead
from lookahead import Draft, Drafter, Grower, InvalidArgument, Lookahead, Pool, PoolBusy, PoolError, PoolMismatch

PROMPT = torch.tensor([[5, 6, 7, 8, 5, 6, 9, 5, 6]])
BATCH = torch.tensor([[5, 6, 7, 8, 9, 3], [PAD, PAD, PAD, 8, 9, 3]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])


@pytest.fixture
def model() -> Any:
    return tiny("llama")


def holds(pool: Pool, tokens: list[int]) -> bool:
    """Whether `tokens` stand together in the pool."""
    return pool.longest_match(tokens) == min(len(tokens), 32)


def test_outputs_are_added_with_what_they_are_found_by(model: Any) -> None:
    la = Lookahead(model, pool=Pool())
    output = la.generate(PROMPT, max_new_tokens=12, do_sample=False)
    assert output.equal(model.generate(PROMPT, max_new_tokens=12, do_sample=False))
    assert holds(la.pools[0], output[0].tolist()), "a prompt this short is kept whole"
    assert la.pools[0].documents == 1
    la.generate(PROMPT, max_new_tokens=12, do_sample=False)
    assert la.pools[0].documents == 1, "the same again is no news"


@pytest.mark.parametrize(("remember", "kept"), [("output", 32), ("all", 60)])
def test_how_much_of_the_prompt_is_kept(model: Any, remember: Any, kept: int) -> None:
    prompt = torch.randint(1, VOCAB, (1, 60), generator=torch.Generator().manual_seed(0))
    la = Lookahead(model, pool=Pool(), remember=remember)
    la.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5)
    assert la.pools[0].tokens == kept + 5


def test_nothing_is_kept_where_that_is_asked(model: Any) -> None:
    pool = Pool()
    Lookahead(model, pool=pool, remember=None).generate(PROMPT, max_new_tokens=12)
    lookahead.generate(model, PROMPT, pool=pool, remember=None, max_new_tokens=12)
    assert pool.tokens == 0


def test_padding_is_never_kept(model: Any) -> None:
    plain = model.generate(BATCH, attention_mask=MASK, max_new_tokens=20)
    eos = int(plain[0, 9])
    arguments = {"attention_mask": MASK, "max_new_tokens": 20, "eos_token_id": eos, "pad_token_id": PAD}
    la = Lookahead(model, pool=Pool())
    output = la.generate(BATCH, **arguments)
    assert output.equal(model.generate(BATCH, **arguments))
    assert la.pools[0].documents == 2
    rows = [[t for t, m in zip(row.tolist(), [*mask.tolist(), *[1] * 20], strict=False) if m] for row, mask in
            zip(output, MASK, strict=True)]  # fmt: skip
    ends = [row.index(eos) + 1 if eos in row else len(row) for row in rows]
    assert la.pools[0].tokens == sum(ends)
    assert all(holds(la.pools[0], row[:end]) for row, end in zip(rows, ends, strict=True))


def test_plain_decoding_is_remembered_too(model: Any) -> None:
    la = Lookahead(model, pool=Pool(), nodes=0)
    output = la.generate(PROMPT, max_new_tokens=9)
    assert holds(la.pools[0], output[0].tolist())


def test_the_second_request_is_drafted_from_the_first(model: Any) -> None:
    la = Lookahead(model, sources=("pool",), pool=Pool(), nodes=32)
    la.generate(PROMPT, max_new_tokens=32)
    assert la.last is not None
    alone = la.last.tokens_per_pass
    la.generate(PROMPT, max_new_tokens=32)
    assert alone == 1.0
    assert la.last.tokens_per_pass > 3.0


def test_several_pools_are_asked_together(model: Any) -> None:
    plain = model.generate(PROMPT, max_new_tokens=32)[0].tolist()
    mine, team = Pool(), Pool()
    mine.add(plain[:24])
    team.add(plain[16:])
    la = Lookahead(model, sources=("pool",), pool=[mine, team], remember=None, nodes=32)
    la.generate(PROMPT, max_new_tokens=32)
    assert la.last is not None
    assert la.last.tokens_per_pass > 2.0
    Lookahead(model, pool=[mine, team]).generate(PROMPT + 1, max_new_tokens=8)
    assert (mine.documents, team.documents) == (2, 1), "the first one is added to"


def test_a_directory_is_opened_closed_and_remembered(model: Any, tmp_path: Path) -> None:
    with Lookahead(model, tokenizer(), pool=tmp_path / "pool") as la:
        output = la.generate(PROMPT, max_new_tokens=12)
        with pytest.raises(PoolBusy, match="read_only"):
            Lookahead(model, pool=str(tmp_path / "pool"))
    with Pool.open(tmp_path / "pool", tokenizer=tokenizer()) as pool:
        assert holds(pool, output[0].tolist())
        assert pool.calibration is not None
    lookahead.generate(model, PROMPT + 1, pool=tmp_path / "pool", max_new_tokens=12)
    with Pool.open(tmp_path / "pool") as pool:
        assert pool.documents == 2


def test_what_was_learnt_starts_the_next_process(model: Any, tmp_path: Path) -> None:
    with Lookahead(model, pool=tmp_path / "pool") as la:
        la.generate(PROMPT, max_new_tokens=32)
        assert isinstance(la.drafter, Grower)
        learnt = la.drafter.weights.w.copy()
    with Lookahead(model, pool=tmp_path / "pool") as la:
        assert isinstance(la.drafter, Grower)
        assert (la.drafter.weights.w == learnt).all()
        assert (Grower().weights.w != learnt).any()


def test_what_is_learnt_stays_out_of_the_pool_too_where_that_is_asked(model: Any) -> None:
    pool = Pool()
    Lookahead(model, pool=pool).generate(PROMPT, max_new_tokens=16)
    before = pool.calibration
    assert before is not None
    Lookahead(model, pool=pool, remember=None).generate(PROMPT + 1, max_new_tokens=32)
    assert pool.calibration == before
    Lookahead(model, pool=pool).generate(PROMPT + 2, max_new_tokens=32)
    assert pool.calibration != before


def test_closing_closes_every_pool(model: Any, tmp_path: Path) -> None:
    la = Lookahead(model, pool=[tmp_path / "one", tmp_path / "two"])
    la.pools[1].close()
    with (
        mock.patch.object(la.pools[1], "close", side_effect=PoolError("disk full")),
        pytest.raises(PoolError, match="disk full"),
    ):
        la.close()
    Pool(tmp_path / "one").close()


def test_a_reader_adds_nothing(model: Any, tmp_path: Path) -> None:
    with Pool(tmp_path) as pool:
        pool.add([1, 2, 3])
    with Pool.open(tmp_path, read_only=True) as pool:
        Lookahead(model, pool=pool).generate(PROMPT, max_new_tokens=8)
        assert pool.documents == 1


def test_a_pool_of_another_tokenizer_is_refused(model: Any, tmp_path: Path) -> None:
    other = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with Pool(tmp_path, tokenizer=other):
        pass
    with pytest.raises(PoolMismatch, match="another tokenizer"):
        Lookahead(model, tokenizer(), pool=tmp_path)
    with Pool(tmp_path, tokenizer=other) as pool, pytest.raises(PoolMismatch, match="another tokenizer"):
        Lookahead(model, tokenizer(), pool=pool)
    memory = Pool(tokenizer=other)
    with pytest.raises(PoolMismatch, match="in memory"):
        Lookahead(model, tokenizer(), pool=memory)


def test_a_pool_that_fails_costs_no_output(model: Any) -> None:
    la = Lookahead(model, pool=Pool())
    plain = model.generate(PROMPT, max_new_tokens=8)
    with mock.patch.object(Pool, "add", side_effect=PoolError("disk full")):
        assert la.generate(PROMPT, max_new_tokens=8).equal(plain)
    with pytest.raises(PoolError, match="disk full"):
        la.generate(PROMPT, max_new_tokens=8)
    assert la.generate(PROMPT, max_new_tokens=8).equal(plain), "told once"
    assert la.pools[0].documents == 0


def test_an_error_in_decoding_adds_nothing(model: Any) -> None:
    def stop(*_: Any) -> Any:
        raise RuntimeError("criterion")

    la = Lookahead(model, pool=Pool())
    with pytest.raises(RuntimeError, match="criterion"):
        la.generate(PROMPT, max_new_tokens=8, stopping_criteria=[stop])
    assert la.pools[0].documents == 0


@pytest.mark.parametrize("bad", [3, [Pool(), 3], {"a": 1}.items()])
def test_what_is_no_pool_is_named(model: Any, bad: Any) -> None:
    with pytest.raises(InvalidArgument, match="pool has a"):
        Lookahead(model, pool=bad)
    with pytest.raises(InvalidArgument, match="pools has a"):
        Grower(pools=(3,))  # type: ignore[arg-type]


def test_arguments_that_do_not_fit(model: Any) -> None:
    class Never(Drafter):
        def propose(self, context: Any, budget: int) -> Draft:
            return Draft.root(int(context[-1]))

    with pytest.raises(InvalidArgument, match="drafter or pool"):
        Lookahead(model, drafter=Never(), pool=Pool())
    with pytest.raises(InvalidArgument, match="remember='some'"):
        Lookahead(model, pool=Pool(), remember="some")  # type: ignore[arg-type]
