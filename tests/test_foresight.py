"""Noise ahead: what drafters are shown is what will be drawn with, and the generator never tells that they looked."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from law import BATTERY, Case, assert_exact, assert_steps_fit
from models import PAD, VOCAB, tiny
from numba import njit
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList
from transformers.generation import logits_process as hf
from users import PROCESSORS, Recording

from lookahead import Draft, Drafter, Jacobi, Lookahead, demo_path
from lookahead.foresight import USUAL, Foresight, Usual
from lookahead.sampling import NoiseLedger, Sampler
from lookahead.sources import evidence
from lookahead.sources.noise import Noise
from lookahead.sources.race import CERTAINTIES, DOUBTS, LEVELS, PLACES, learn_race, run_race, untrained_race

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 5, 6], [9, 10, 11, 12, 13, 9], [20, 21, 20, 21, 20, 21]])


def usual_of(vocab: int) -> Usual:
    usual = Usual()
    usual.begin(torch.arange(vocab)[None], vocab)
    return usual


def shown(noise: Noise) -> list[Any]:
    """Return the blocks that are known, from the next column on."""
    at, count, _ = noise.state.tolist()
    return [noise.blocks[(at + d) % len(noise.blocks)] for d in range(count)]


# What is shown


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 3),
    vocab=st.sampled_from((17, 48, 300)),
    ahead=st.integers(1, 6),
    moves=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), max_size=12),
    columns=st.integers(1, 24),
)
def test_what_is_shown_is_what_multinomial_draws_with(
    seed: int, rows: int, vocab: int, ahead: int, moves: list[tuple[int, int]], columns: int
):
    """Rows move on at their own pace, settled columns are released, and all that is not used goes back."""
    probs = torch.rand(columns, rows, vocab, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    torch.manual_seed(seed)
    states, picks = [torch.get_rng_state()], []
    for column in range(columns):
        picks.append(torch.multinomial(probs[column], 1).squeeze(1))
        states.append(torch.get_rng_state())
    torch.manual_seed(seed)
    ledger, at = NoiseLedger(rows, CPU), [0] * rows
    with mock.patch("lookahead.foresight.AHEAD", ahead):
        foresight = Foresight(ledger, rows, vocab, 1.0, usual_of(vocab))
    for row, step in [*((row, 0) for row in range(rows)), *moves]:
        row %= rows
        at[row] = min(at[row] + step, columns - 1)
        ledger.release(min(at))
        foresight.look(row, at[row], columns - at[row])
        noise = foresight.row(row)
        blocks = shown(noise)
        assert len(blocks) == min(ahead, columns - at[row])
        assert noise.state[2] in range(DOUBTS)
        for d, block in enumerate(blocks):
            column = at[row] + d
            assert int((probs[column, row] / torch.from_numpy(block)).argmax()) == picks[column][row]
            assert noise.blocks.dtype == np.float32
        nodes, depth = len(blocks) + 2, np.arange(len(blocks) + 2, dtype=np.int32)
        scores = torch.stack([probs[min(at[row] + d, columns - 1), row].log() for d in range(nodes)])
        drawn = foresight.picks(row, at[row], scores, depth)
        assert drawn[: len(blocks)].tolist() == [int(picks[at[row] + d][row]) for d in range(len(blocks))]
    ledger.rewind(min(at))
    assert torch.equal(torch.get_rng_state(), states[min(at)])


def test_the_tokens_that_noise_favours():
    """A block knows the tokens of the largest usual chance over its noise."""
    torch.manual_seed(0)
    usual, ledger = usual_of(VOCAB), NoiseLedger(2, CPU)
    foresight = Foresight(ledger, 2, VOCAB, 0.5, usual)
    for column in range(80):
        chances = torch.randn(2, VOCAB).mul(2).softmax(-1)
        for row in range(2):
            foresight.look(row, column, 100)
            noise = foresight.row(row)
            assert noise.heat[0] == 2.0
            for d, block in enumerate(shown(noise)):
                at = (noise.state[0] + d) % len(noise.blocks)
                if d == len(shown(noise)) - 1:  # others may have been asked before, by what was usual then
                    score = usual._chances.numpy() / block  # type: ignore[union-attr]
                    assert noise.tokens[at].tolist() == np.argsort(-score, kind="stable")[:USUAL].tolist()
                    assert np.allclose(noise.chances[at], usual._chances.numpy()[noise.tokens[at]])  # type: ignore[union-attr]
        usual.learn(chances)


def test_usual_is_the_average_of_what_was_sampled_from():
    prompt, usual = torch.tensor([[1, 1, 2, 3]]), Usual()
    usual.begin(prompt, 6)
    average = np.array([0, 2, 1, 1, 0, 0]) / 8 + 0.5 / 6
    assert np.allclose(usual._chances, average)
    rng, seen = np.random.default_rng(0), 4
    for _ in range(400):
        probs = rng.dirichlet(np.ones(6), size=2).astype(np.float32)
        usual.learn(torch.from_numpy(probs))
        for row in probs:
            seen = min(seen + 1, 256)
            average = average + (row - average) / seen
    assert np.allclose(usual._chances, average, atol=1e-5)
    before = usual._chances
    usual.begin(torch.tensor([[5, 5]]), 6)
    assert torch.equal(usual._chances, before), "what is known stays for the next text"  # type: ignore[arg-type]
    usual.begin(torch.zeros((1, 0), dtype=torch.long), 9)
    assert np.allclose(usual._chances, 0.5 / 9), "scores of another width begin anew, and an empty prompt says nothing"


@pytest.mark.parametrize(("chance", "doubts"), [(0.99, 0), (0.8, 1), (0.3, 2)])
def test_doubt_follows_the_model(chance: float, doubts: int):
    usual, rest = usual_of(VOCAB), (1 - chance) / (VOCAB - 1)
    foresight = Foresight(NoiseLedger(1, CPU), 1, VOCAB, 1.0, usual)
    for _ in range(200):
        usual.learn(torch.tensor([[chance] + [rest] * (VOCAB - 1)]))
    with torch.random.fork_rng():
        foresight.look(0, 0, 10)
    assert usual.doubt == pytest.approx(1 - chance, abs=0.01)
    assert foresight.row(0).state[2] == doubts


# Who may look


class Looks(Drafter):
    """Writes down the noise that it is shown, and the generator's state whenever it is asked."""

    def __init__(self, looks: bool = True) -> None:
        self.looks, self.noise = looks, list[Noise]()
        self.states, self.columns = list[Tensor](), list[int]()

    def foresee(self, noise: Noise) -> bool:
        self.noise.append(noise)
        return self.looks

    def propose(self, context: Any, budget: int) -> Draft:
        self.states.append(torch.get_rng_state())
        self.columns.append(len(context))
        return Draft.root(int(context[-1]))


def sampled(drafter: Any, rows: int = 1, **arguments: Any) -> Lookahead:
    la, ids = Lookahead(tiny("llama"), drafter=drafter, nodes=8), IDS[:rows]
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": True} | arguments
    torch.manual_seed(3)
    plain = tiny("llama").generate(ids, **arguments)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(la.generate(ids, **arguments), plain)
    assert torch.equal(torch.get_rng_state(), after)
    return la


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("looks", [True, False])
def test_nothing_is_drawn_ahead_for_those_who_do_not_look(looks: bool, rows: int):
    """The columns before were drawn; a drafter that does not look finds the generator where plain has it."""
    torch.manual_seed(3)
    states = [torch.get_rng_state()]
    for _ in range(12):
        torch.multinomial(torch.ones(rows, VOCAB), 1)
        states.append(torch.get_rng_state())
    drafter = Looks(looks)
    sampled(drafter, rows)
    assert len(drafter.noise) == rows
    for state, column in zip(drafter.states, drafter.columns, strict=True):
        assert torch.equal(state, states[12 if looks else column - IDS.shape[1]])


def test_noise_is_shown_only_where_it_is_known():
    class Mine(hf.LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores

    def foresight(*processors: Any, **arguments: Any) -> Foresight | None:
        options = {"do_sample": True, "rows": 1, "device": CPU, "ahead": True} | arguments
        sampler = Sampler(LogitsProcessorList(processors), **options)
        sampler.foresee(usual_of(VOCAB), torch.zeros((1, 0), dtype=torch.long), VOCAB)
        return sampler.foresight

    for rows in (1, 3):
        assert foresight(rows=rows) is not None
        assert foresight(hf.TemperatureLogitsWarper(0.7), hf.TopPLogitsWarper(0.9), rows=rows) is not None
        assert foresight(Mine(), rows=rows) is None
        assert foresight(hf.TemperatureLogitsWarper(0.7), Mine(), rows=rows) is None
        assert foresight(ordered=True, rows=rows) is None
        assert foresight(do_sample=False, rows=rows) is None
        assert foresight(ahead=False, rows=rows) is None
    known = foresight(hf.TemperatureLogitsWarper(0.5), hf.TemperatureLogitsWarper(0.5))
    assert known is not None
    assert known.row(0).heat[0] == 4.0
    with mock.patch("lookahead.foresight.ROOM", 3 * VOCAB):
        for rows, columns in ((1, 3), (3, 1), (4, 0)):
            known = foresight(rows=rows)
            assert known is not None
            assert len(known.row(0).blocks) == columns


@pytest.mark.parametrize("rows", [1, 3])
def test_what_else_may_draw_switches_it_off(rows: int):
    for arguments in (
        {"logits_processor": [PROCESSORS["Noisy"]([])]},
        {"stopping_criteria": [lambda ids, scores, **_: torch.rand(len(ids)) < 0.02]},
    ):
        drafter = Looks()
        sampled(drafter, rows, **arguments)
        assert drafter.noise == []
    drafter = Looks()
    sampled(drafter, rows, do_sample=False)
    assert drafter.noise == []


def test_a_streamer_of_the_users_may_draw():
    class Draws(Recording):
        def put(self, value: Any) -> None:
            torch.rand(1)
            super().put(value)

    drafter = Looks()
    sampled(drafter, streamer=Draws([]))
    assert drafter.noise == []
    sampled(drafter, streamer=None)
    assert len(drafter.noise) == 1


# Nothing is left behind


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("who", ["recycle+prompt", "prompt+recycle+jacobi"])
def test_the_generator_ends_where_plain_leaves_it(who: str, rows: int):
    base = {"rows": rows, "mask": "left", "sample": True, "drafter": who, "new": 24}
    for seed in range(3):
        assert_exact(Case(seed=seed, eos=(4, 9, 17, 30), **base))
        assert_exact(Case(seed=seed, calls=3, options=(("temperature", 0.7), ("top_k", 9)), **base))
        assert_exact(Case(seed=seed, stop_strings=("e", "9", "q"), **base))
        for limit in (("foreseen", 0), ("foreseen", 1), ("room", rows * VOCAB - 1), ("room", 2 * rows * VOCAB)):
            assert_exact(Case(seed=seed, eos=(4,), limits=(limit,), **base))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [6, 7, 12, 20])
def test_a_processor_that_fails_midway_leaves_the_generator_as_plain_does(rows: int, length: int):
    call, states = hf.RepetitionPenaltyLogitsProcessor.__call__, []

    def failing(self: Any, ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] >= length:
            raise ValueError("enough")
        return call(self, ids, scores)

    ids, model = IDS[:rows], tiny("llama")
    la = Lookahead(model, sources=("prompt", "recycle", Jacobi(window=4, ngram=3, switch="on")))
    with mock.patch.object(hf.RepetitionPenaltyLogitsProcessor, "__call__", failing):
        for generate in (model.generate, la.generate):
            torch.manual_seed(5)
            with pytest.raises(ValueError, match="enough"):
                generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=True,
                         repetition_penalty=1.1)  # fmt: skip
            states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("options", [(), (("temperature", 0.6),), (("temperature", 1.5), ("top_k", 20))])
def test_what_is_foreseen_at_accepted_nodes_is_what_was_picked(rows: int, options: Any):
    """`assert_steps_fit` compares; here it is held that there is something to compare."""
    known = 0
    for limit in ((), (("foreseen", 3),)):
        watcher = assert_steps_fit(
            Case(seed=2, rows=rows, mask="left", sample=True, new=40, drafter="prompt+recycle+jacobi", options=options,
                 limits=limit)
        )  # fmt: skip
        drawn = [(step, drawn) for row in watcher.rows for step, drawn in zip(row.steps, row.drawn, strict=False)]
        assert all(one is not None for _, one in drawn)
        known += sum(step.accepted for step, _ in drawn)
    assert known > 10


def test_odd_requests_one_after_the_other():
    """Inference mode before and after, logits wider than the vocabulary, a tiny vocabulary, a source that names tokens
    that nobody has."""

    class Far:
        start = extend = observe = lambda self, *_: None

        def successors(self, cursor: Any) -> Any:
            return [2**31 - 1, 10**6, VOCAB, 5], [0.5, 0.5, 0.5, 0.1]

    wide = copy.deepcopy(tiny("llama"))
    wide.lm_head = torch.nn.Linear(32, VOCAB + 16, dtype=torch.float64)
    wide.lm_head.bias.data[VOCAB:] = -1e9
    models = [(tiny("llama"), ("prompt", Far())), (wide, ("prompt", "recycle", "jacobi"))]
    models += [(tiny("llama", vocab_size=size), ("prompt", "recycle", Jacobi(switch="on"))) for size in (5, 12, 16)]
    for model, sources in models:
        la = Lookahead(model, sources=sources)
        ids = IDS[:2] if model.config.vocab_size > 40 else IDS[:2] % 2 + 3
        for rows, inference in ((1, True), (2, False), (1, False), (2, True)):
            states, answers = [], []
            for generate in (model.generate, la.generate):
                torch.manual_seed(rows)
                with torch.inference_mode(inference):
                    answers.append(generate(ids[:rows], attention_mask=torch.ones_like(ids[:rows]), max_new_tokens=16,
                                            do_sample=True, pad_token_id=PAD))  # fmt: skip
                states.append(torch.get_rng_state())
            assert torch.equal(*answers)
            assert torch.equal(*states)


# The race


@njit
def run(weights, noise, at, named, found):  # type: ignore[no-untyped-def]
    run_race(weights, noise, at, named, found)


@njit
def learn(weights, found, token):  # type: ignore[no-untyped-def]
    learn_race(weights, found, token)


class Field:
    """Successors in a race: `named` have estimates, the others usual chances."""

    def __init__(self, estimates: Any, usual: Any, noise: Any, doubt: int = 0, certain: float = 0.0) -> None:
        self.found, self.named, count = evidence.empty_evidence(), len(estimates), len(estimates) + len(usual)
        self.found.size[0] = count
        rows = self.found.rows
        rows["token"][:count] = range(count)
        rows["weight"][: self.named], rows["given"][: self.named] = estimates, estimates
        rows["usual"][self.named : count] = usual
        rows["recycled"][:1] = certain
        state = np.array([0, 1, doubt])
        blocks = np.array(noise, np.float32)[None]
        none = np.zeros((1, 0), np.float32)
        self.noise = Noise(blocks, none.astype(np.int32), none, state, np.ones(1, np.float32))

    def chances(self, weights: Any) -> Any:
        run(weights, self.noise, np.int64(0), np.int64(self.named), self.found)
        return self.found.rows["weight"][: self.found.size[0]].copy()


def trained(seed: int | None = None) -> Any:
    from lookahead.sources.mixer import untrained_weights

    weights = untrained_weights()
    weights.race[:] = untrained_race() if seed is None else np.random.default_rng(seed).normal(size=weights.race.shape)
    return weights


def log_odds(chance: float) -> float:
    return float(np.clip(np.log(chance / (1 - chance)) if 1e-3 < chance < 1 - 1e-3 else (7 if chance > 0.5 else -7),
                         -np.log(999), np.log(999)))  # fmt: skip


def naive_race(weights: Any, estimates: Any, usual: Any, noise: Any, doubt: int, certain: float) -> list[float]:
    """Return the chance of every successor to be drawn."""
    left = max(1.0 - sum(estimates), 0.02)
    given_ = [*estimates, *(left * one for one in usual)]
    scores = [np.log((one + 1e-12) / (q + 1e-12)) for one, q in zip(given_, noise, strict=True)]
    sure = 0 if certain == 0 or not len(estimates) else 1 if certain < 0.6 else 2 if certain < 0.95 else 3
    chances = []
    for j, (one, score) in enumerate(zip(given_, scores, strict=True)):
        place = sum(other > score for other in scores)
        rival = max((other for i, other in enumerate(scores) if i != j), default=-80.0) if place == 0 else max(scores)
        x = [
            1.0,
            log_odds(one) / 4,
            np.clip(score - rival, -6, 6) / 2,
            -0.3 * min(np.exp(-score) * (1 - one), 6),
            -0.3 * min(np.exp(-score) * left, 6),
        ]
        by_place = min(place, PLACES - 1) + (PLACES if j >= len(estimates) else 0) + 2 * PLACES * doubt
        level = int((log_odds(one) + 7) * LEVELS / 14) + LEVELS * (sure + CERTAINTIES * doubt)
        z = np.dot(weights.race[by_place] + weights.race[2 * PLACES * DOUBTS + level], x)
        chances.append(1 / (1 + np.exp(-np.clip(z, -8, 8))))
    return chances


@settings(max_examples=100)
@given(
    st.integers(0, 2**32),
    st.integers(0, 6),
    st.integers(0, 6),
    st.integers(0, DOUBTS - 1),
    st.sampled_from((0.0, 0.3, 0.8, 0.99)),
    st.none() | st.integers(0, 9),
)
def test_the_race_equals_naive(seed: int, named: int, others: int, doubt: int, certain: float, learnt: int | None):
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(named + 1, 0.5)).astype(np.float32)[:named]
    usual, noise = rng.uniform(0, 0.1, others).astype(np.float32), rng.exponential(size=named + others)
    weights = trained(learnt)
    ours = Field(share, usual, noise, doubt, certain).chances(weights)
    wanted = naive_race(weights, share, usual, np.float32(noise), doubt, certain)
    assert np.allclose(ours, wanted, atol=1e-3)


def test_tokens_that_nobody_has_cannot_win():
    field = Field([0.5, 0.2, 0.2], [0.1], [1.0, 1.0, 1.0, 1.0])
    field.found.rows["token"][1] = 2**31 - 1
    chances = field.chances(trained())
    assert np.isfinite(chances).all()
    assert chances[1] < 0.01
    assert field.found.rows["score"][1] < -50


@pytest.mark.parametrize("token", range(5))
def test_learning_moves_chances_towards_what_was_drawn(token: int):
    weights, field = trained(), Field([0.4, 0.3, 0.1], [0.05, 0.02], [1.0, 0.5, 0.8, 0.1, 2.0])
    before = field.chances(weights)
    for _ in range(20):
        field.found.rows["weight"][:3] = 0.4, 0.3, 0.1
        field.chances(weights)
        learn(weights, field.found, np.int64(token))
    field.found.rows["weight"][:3] = 0.4, 0.3, 0.1
    after = field.chances(weights)
    assert after[token] > before[token]
    assert after.sum() - after[token] < before.sum() - before[token]


@pytest.mark.parametrize("right", [True, False])
def test_how_far_estimates_are_trusted_is_learnt(right: bool):
    """Where the estimates are right the winner is known nearly always; where they are made up the race says little."""
    rng, weights, hits, sure = np.random.default_rng(0), trained(), [], []
    for _ in range(3000):
        chances, noise = rng.dirichlet(np.full(6, 0.6)), rng.exponential(size=6)
        drawn = int(np.argmax(chances / noise))
        field = Field((chances if right else rng.permutation(chances)) * 0.98, [], noise)
        said = field.chances(weights)
        hits.append(int(np.argmax(said)) == drawn)
        sure.append(said.max())
        learn(weights, field.found, np.int64(drawn))
    assert np.mean(hits[-1000:]) == pytest.approx(np.mean(sure[-1000:]), abs=0.08), "chances are what they say"
    assert np.mean(hits[-1000:]) > (0.97 if right else 0.3)
    assert np.mean(sure[-1000:]) > 0.85 or not right


# What it is good for


def test_sampled_text_is_drafted_better_by_those_who_look():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(demo_path()), AutoTokenizer.from_pretrained(demo_path())
    prompts = ("def add(a, b):\n", "The name of the town is", "import os\n\n\nclass Reader:\n")
    gained = {}
    for ahead in (0, 16):
        tokens, passes, la = 0, 0, Lookahead(model, tokenizer, nodes=32)
        with mock.patch("lookahead.foresight.AHEAD", ahead):
            for seed, prompt in enumerate(prompts):
                torch.manual_seed(seed)
                inputs = tokenizer(prompt, return_tensors="pt")
                la.generate(**inputs, max_new_tokens=64, do_sample=True, temperature=1.0, top_k=0, eos_token_id=None,
                            pad_token_id=0)  # fmt: skip
                assert la.last is not None
                tokens, passes = tokens + la.last.tokens, passes + la.last.forwards
        gained[ahead] = tokens / passes
    assert gained[16] > 1.2 * gained[0]


def test_the_battery_with_noise_and_window():
    for case in BATTERY:
        if case.sample and not case.processors and not case.criteria:
            assert_exact(Case(**{name: getattr(case, name) for name in case.__dataclass_fields__} | {
                "drafter": "prompt+recycle+jacobi", "poison": False}))  # fmt: skip


@pytest.mark.parametrize("placeholder", [-200, 10**6, 2**31 - 1])
@pytest.mark.parametrize("sample", [False, True])
def test_ids_beside_embeddings_may_be_anything(placeholder: int, sample: bool):
    """They are placeholders of what the embeddings hold; neither the usual chances nor a window may trip over them."""
    model = tiny("llama")
    ids = torch.tensor([[5, placeholder, placeholder, 6, 7]])
    arguments = {"inputs_embeds": model.get_input_embeddings()(ids.clamp(3, VOCAB - 1)).detach(), "input_ids": ids}
    arguments |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": sample}
    for sources in (("prompt", "recycle"), (Jacobi(window=3, ngram=4, verify=3, switch="on"),)):
        torch.manual_seed(1)
        plain = model.generate(**arguments)
        torch.manual_seed(1)
        assert Lookahead(model, sources=sources).generate(**arguments).equal(plain)
