"""Picking: the noise of the future is the noise of `torch.multinomial`, and rows of a batch do not see each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from lookahead.grammar.processor import GrammarProcessor
from lookahead.sampling import (
    ROW_LOCAL,
    ROW_PURE,
    NoiseLedger,
    Sampler,
    draws_match,
    generator_state,
    set_generator_state,
)

CPU = torch.device("cpu")
ROWS, VOCAB, PROMPT = 3, 20, 4
EOS = torch.tensor([3])
PROMPTS = torch.arange(ROWS * PROMPT).view(ROWS, PROMPT) % VOCAB

BUILT = [
    hf.TemperatureLogitsWarper(0.7),
    hf.TopKLogitsWarper(5),
    hf.TopPLogitsWarper(0.8),
    hf.MinPLogitsWarper(0.1),
    hf.TypicalLogitsWarper(0.8),
    hf.EpsilonLogitsWarper(0.03),
    hf.EtaLogitsWarper(0.03),
    hf.InfNanRemoveLogitsProcessor(),
    hf.LogitNormalization(),
    hf.SuppressTokensLogitsProcessor([3, 4]),
    hf.MinLengthLogitsProcessor(7, EOS),
    hf.MinNewTokensLengthLogitsProcessor(PROMPT, 3, EOS),
    hf.RepetitionPenaltyLogitsProcessor(1.5),
    hf.EncoderRepetitionPenaltyLogitsProcessor(1.5, PROMPTS),
    hf.NoRepeatNGramLogitsProcessor(2),
    hf.EncoderNoRepeatNGramLogitsProcessor(2, PROMPTS),
    hf.SequenceBiasLogitsProcessor([[[5], 2.0], [[3, 4], -3.0]]),
    hf.NoBadWordsLogitsProcessor([[5], [3, 4]], EOS),
    hf.ForcedBOSTokenLogitsProcessor(2),
    hf.ForcedEOSTokenLogitsProcessor(7, 3),
    hf.ExponentialDecayLengthPenalty((1, 1.5), EOS, PROMPT),
    hf.SuppressTokensAtBeginLogitsProcessor([3, 4], PROMPT),
]


def test_every_processor_that_rows_may_be_asked_alone_is_tried_here() -> None:
    assert {type(processor) for processor in BUILT} == ROW_LOCAL - {GrammarProcessor}  # which has laws of its own


@pytest.mark.parametrize("processor", BUILT, ids=lambda p: type(p).__name__)
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), columns=st.integers(0, 6))
def test_a_row_sees_no_other_row_and_no_other_call(processor: Any, seed: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    new = torch.randint(0, VOCAB, (ROWS, columns), generator=generator)
    ids, scores = torch.cat([PROMPTS, new], 1), 3 * torch.randn(ROWS, VOCAB, generator=generator)
    together = processor(ids, scores.clone())
    for row in range(ROWS):
        others_ids, others_scores = torch.zeros_like(ids), torch.zeros_like(scores)
        others_ids[row], others_scores[row] = ids[row], scores[row]
        processor(PROMPTS[:, :1], torch.zeros_like(scores))  # another column in between
        alone = processor(others_ids, others_scores)
        assert torch.equal(alone[row], together[row])


@pytest.mark.parametrize("processor", [p for p in BUILT if type(p) in ROW_PURE], ids=lambda p: type(p).__name__)
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), nodes=st.integers(1, 40))
def test_a_pure_processor_sees_one_row_of_scores_and_no_ids(processor: Any, seed: int, nodes: int) -> None:
    scores = 3 * torch.randn(nodes, VOCAB, generator=torch.Generator().manual_seed(seed))
    stacked = processor(None, scores.clone())
    for node in range(nodes):
        assert torch.equal(processor(PROMPTS[:1], scores[node : node + 1].clone())[0], stacked[node])


def test_whatever_else_is_asked_in_step() -> None:
    class Mine(hf.TopKLogitsWarper):
        pass

    def sampler(*processors: Any, rows: int = 2, do_sample: bool = False) -> Sampler:
        return Sampler(LogitsProcessorList(processors), do_sample=do_sample, rows=rows, device=CPU)

    assert sampler(Mine(3)).lockstep
    assert sampler(hf.PrefixConstrainedLogitsProcessor(lambda row, ids: [1], 1)).lockstep
    assert sampler(BUILT[0], lambda ids, scores: scores).lockstep
    assert not sampler(Mine(3), rows=1).lockstep
    assert not sampler(*BUILT).lockstep
    assert not sampler(*BUILT, do_sample=True).lockstep


def test_draws_match_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    draws_match.__globals__["_DRAWS_MATCH"].clear()
    assert draws_match(CPU)
    assert draws_match(CPU)
    assert torch.equal(before, torch.get_rng_state())


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 5),
    vocab=st.sampled_from((2, 17, 48, 300)),
    asked=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    used=st.integers(0, 7),
)
def test_ledger_replays_multinomial(seed: int, rows: int, vocab: int, asked: list[int], used: int) -> None:
    """In whatever order columns are asked, each holds the noise of plain sampling; unused noise goes back."""
    probs = torch.rand(8, rows, vocab, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    torch.manual_seed(seed)
    states, picks = [], []
    for column in range(8):
        states.append(torch.get_rng_state())
        picks.append(torch.multinomial(probs[column], 1).squeeze(1))
    torch.manual_seed(seed)
    ledger, floor = NoiseLedger(rows, CPU), 0
    for column in asked:
        column = max(column, floor)
        assert torch.equal((probs[column] / ledger.noise(column, vocab)).argmax(-1), picks[column])
        floor = min(max(floor, column - 2), used)
        ledger.release(floor)
    ledger.rewind(used)
    drawn = max(max(column, 0) for column in asked) + 1
    assert torch.equal(torch.get_rng_state(), states[min(used, drawn)])


def test_generator_state_is_a_copy() -> None:
    state = generator_state(CPU)
    torch.rand(1)
    assert not torch.equal(state, torch.get_rng_state())
    set_generator_state(CPU, state)
    assert torch.equal(state, torch.get_rng_state())


class Taken(list[Any]):
    """Writes down what is recorded."""

    def record(self, column: int, row: int, scores: Any, logits: Any) -> None:
        self.append((column, row, scores.clone(), logits.clone()))


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("processors", [(), (BUILT[0], BUILT[1]), (BUILT[12],)], ids=["none", "pure", "local"])
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 4), column=st.integers(0, 3))
def test_pick_is_one_step_of_plain_sampling(
    do_sample: bool, processors: tuple[Any, ...], seed: int, rows: int, column: int
) -> None:
    """Any nodes of a pass, any rows: tokens, scores and raw logits are those of plain sampling on the same logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, 5, VOCAB, generator=generator, dtype=torch.float64)
    nodes = {row: int(torch.randint(5, (1,), generator=generator)) for row in range(rows)}
    ids = torch.randint(0, VOCAB, (rows, 6), generator=generator)
    raw = torch.stack([logits[row, node] for row, node in nodes.items()]).float()
    scores = LogitsProcessorList(processors)(ids, raw.clone())
    torch.manual_seed(seed)
    for _ in range(column if rows > 1 else 0):  # a batch draws in the order of columns; a single row has done so
        torch.multinomial(torch.ones(rows, VOCAB), 1)
    plain = torch.multinomial(scores.softmax(-1), 1).squeeze(1) if do_sample else scores.argmax(-1)
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    taken = Taken()
    sampler = Sampler(LogitsProcessorList(processors), do_sample=do_sample, rows=rows, device=CPU, recorder=taken)
    best = sampler.load(logits, 3)
    assert best is not None
    assert best[0].shape == best[1].shape == (rows * 5, 3)
    assert sampler.pick(column, nodes, ids if sampler.needs_ids else None) == dict(enumerate(plain.tolist()))
    for i, (at, row, had, logit) in enumerate(taken):
        assert (at, row) == (column, i)
        assert torch.equal(had, scores[i])
        assert torch.equal(logit, raw[i])
    sampler.finish(column + 1)
    if do_sample:
        assert torch.equal(after, torch.get_rng_state())


def test_scores_that_cannot_be_sampled_are_an_error_as_in_plain() -> None:
    for rows in (1, 3):
        sampler = Sampler(LogitsProcessorList(), do_sample=True, rows=rows, device=CPU)
        logits = torch.zeros(rows, 1, VOCAB)
        logits[-1] = float("-inf")
        sampler.load(logits, 0)
        with pytest.raises(RuntimeError, match="probability tensor contains either `inf`, `nan` or element < 0"):
            sampler.pick(0, dict.fromkeys(range(rows), 0), None)


def test_a_row_that_is_only_along_may_have_no_chances() -> None:
    """Processors that look at ids see all rows; what they do to one that does not pick now is nobody's error."""
    processors = LogitsProcessorList([hf.NoBadWordsLogitsProcessor([[5, token] for token in range(VOCAB)], EOS)])
    sampler = Sampler(processors, do_sample=True, rows=2, device=CPU)
    ids = torch.tensor([[1, 2, 4], [1, 2, 5]])
    with sampler.undisturbed():
        sampler.load(torch.zeros(2, 1, VOCAB), 0)
        assert set(sampler.pick(0, {0: 0}, ids)) == {0}
        with pytest.raises(RuntimeError, match="probability tensor"):
            sampler.pick(0, {1: 0}, ids)
