"""Initial weights that can already copy: an induction circuit written into a Llama model.

A model of this size needs far more than 10M tokens before it finds by itself how to copy from its
context (induction heads, Olsson et al. 2022). So the script writes such heads into the initial
weights, leaves small random numbers elsewhere, and then trains all weights:

- Layer 0: heads that look exactly 1, 2, 3 and 4 tokens back, and one that averages the last few.
  Each stores a short code of what it sees in its own slice of the residual stream.
- Layer 1: "rename OLD -> NEW" stands in the prompt. Where OLD stands, heads add NEW; where NEW
  stands, a head makes its code OLD's, so that copying goes on behind it. Four more heads add a
  hash of up to eight earlier tokens, so that similar lines are told apart.
- Layer 2: induction heads. The codes of the last tokens are matched with the codes stored at every
  earlier position, and the token that followed the match is copied to the output.

Scores that nothing matches fall back to the first position, BOS, which holds nothing to copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, HEAD_DIM, HIDDEN = 8, 64, 256
CODE = 24  # width of the code of one earlier token
IDENTITY = HIDDEN - 5 * CODE  # residual dimensions that hold a token's own embedding
SLOW = 10  # rotary pairs from here on turn so slowly that they compare contents
THETA = 1e8
EMBEDDING_SCALE = 0.5
OUTPUT_SCALE = 0.2
INDUCTION_SCORE, LOOKUP_SCORE = 9.0, 12.0  # attention score of a full match
INDUCTION_SINK, LOOKUP_SINK = 0.5, 0.6  # score of BOS, as a part of that
ARROW_SCORE = 30.0
BOS_NORM = 1.17  # the norm makes the codes of BOS, which has no identity, so much larger
INDUCTION_GAIN, NEW_GAIN, OLD_GAIN, CONTEXT_GAIN = 1.0, 1.0, 2.0, 0.3


def make_config(vocab_size: int, bos: int, eos: int, pad: int, layers: int = 4) -> LlamaConfig:
    """Return the architecture; biases let a head look at a fixed distance whatever it reads."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        attention_bias=True,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def code_slice(back: int) -> slice:
    """Return the residual dimensions that hold the code of the token `back` places back."""
    start = IDENTITY + (back - 1) * CODE
    return slice(start, start + CODE)


@dataclass(frozen=True, slots=True)
class Match:
    """One comparison of a head: what the query reads, what the key reads, and its weight.

    0 is the token itself, 1 to 4 the token so many places back, BAG the last few tokens.
    """

    query: int
    key: int
    weight: float


BAG = 5
# (distance, slice): queries read the hash in BAG; keys, which stand one later, the one in 4
CONTEXT = ((4, BAG), (8, BAG), (5, 4), (9, 4))
SHORT = (Match(0, 1, 0.8), Match(1, 2, 0.6), Match(2, 3, 0.6))
LONG = (Match(0, 1, 0.7), Match(1, 2, 0.5), Match(2, 3, 0.5), Match(BAG, 4, 0.8))
SKIP = (Match(1, 2, 0.8), Match(2, 3, 0.6), Match(BAG, 4, 0.8))  # goes on behind a changed token
INDUCTION = (SHORT, SHORT, SHORT, LONG, LONG, LONG, SKIP, SKIP)


def write_circuit(model: LlamaForCausalLM, *, arrow: int, seed: int = 0) -> None:
    """Overwrite the weights of `model` where the circuit lives; `arrow` is the token " -> "."""
    Circuit(model, arrow, torch.Generator().manual_seed(seed)).write()


class Circuit:
    """Writes the parts of the circuit; owns the random projections that they share."""

    def __init__(self, model: LlamaForCausalLM, arrow: int, generator: torch.Generator) -> None:
        self.model = model
        self.arrow = arrow
        self.generator = generator
        self.project = self._orthogonal(IDENTITY, CODE).T  # embedding -> code
        self.slow = torch.arange(SLOW, HEAD_DIM // 2)
        self.turns = [[self._orthogonal(CODE, CODE) for _ in range(4)] for _ in range(2)]
        self.basis = self._orthogonal(IDENTITY, IDENTITY)

    @torch.no_grad()
    def write(self) -> None:
        layers = self.model.model.layers
        self._embeddings()
        for layer in layers:  # small steps at first, or random writes drown the copies
            layer.self_attn.o_proj.weight *= 0.3
            layer.mlp.down_proj.weight *= 0.3
        for layer, heads in zip(layers, (5, 8, len(INDUCTION)), strict=False):
            self._clear(layer.self_attn, heads)
        for head in range(4):
            self._look_back(layers[0].self_attn, head, head + 1)
        self._average(layers[0].self_attn, 4)
        for head in range(3):
            self._to_new(layers[1].self_attn, head)
        self._to_old(layers[1].self_attn, 3)
        for head, (distance, code) in enumerate(CONTEXT, start=4):
            self._context(layers[1].self_attn, head, distance, code)
        for head, matches in enumerate(INDUCTION):
            self._match(layers[2].self_attn, head, matches)
            part = self.basis[torch.arange(head * HEAD_DIM, (head + 1) * HEAD_DIM) % IDENTITY]
            self._copy(layers[2].self_attn, head, part, gain=INDUCTION_GAIN)
        self.model.model.norm.weight.fill_(OUTPUT_SCALE)

    def _embeddings(self) -> None:
        table = self.model.model.embed_tokens.weight
        table.normal_(0, 0.02 * EMBEDDING_SCALE, generator=self.generator)
        table[:, :IDENTITY] = EMBEDDING_SCALE * torch.randn(table.shape[0], IDENTITY, generator=self.generator)
        bos = self.model.config.bos_token_id  # holds codes and no identity: nothing to copy
        table[bos, :IDENTITY] = 0
        table[bos, IDENTITY:] = torch.randn(5 * CODE, generator=self.generator)
        table[bos, code_slice(2)] = 0  # layer 1 copies this one

    def _clear(self, attention: nn.Module, heads: int) -> None:
        """Remove the random numbers from the first heads of a layer."""
        rows = slice(0, heads * HEAD_DIM)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear.weight[rows] = 0
        attention.o_proj.weight[:, rows] = 0

    def _look_back(self, attention: nn.Module, head: int, distance: int) -> None:
        """Attend exactly `distance` tokens back: all fast rotary pairs agree only there."""
        self._at_distance(attention, head, distance, range(SLOW), 12.0)
        self._store(attention, head, distance, gain=1.0)

    def _average(self, attention: nn.Module, head: int) -> None:
        """Attend to about the last eight tokens alike: one rotary pair of medium speed."""
        self._at_distance(attention, head, 4, range(4, 6), 9.0)
        self._store(attention, head, BAG, gain=math.sqrt(8))

    def _context(self, attention: nn.Module, head: int, distance: int, code: int) -> None:
        """Add to `code` a hash of four tokens: those whose codes stand `distance` back."""
        self._at_distance(attention, head, distance, range(SLOW), 12.0)
        rows = slice(head * HEAD_DIM, head * HEAD_DIM + CODE)
        for back, turn in enumerate(self.turns[distance > 6], start=1):
            attention.v_proj.weight[rows, code_slice(back)] = turn
        attention.o_proj.weight[code_slice(code), rows] = torch.eye(CODE) * CONTEXT_GAIN

    def _at_distance(self, attention: nn.Module, head: int, distance: int, pairs: range, score: float) -> None:
        half, start = HEAD_DIM // 2, head * HEAD_DIM
        size = math.sqrt(score * math.sqrt(HEAD_DIM))
        for pair in pairs:
            angle = distance * THETA ** (-pair / half)
            attention.q_proj.bias[start + pair] = size
            attention.k_proj.bias[start + pair] = size * math.cos(angle)
            attention.k_proj.bias[start + pair + half] = size * math.sin(angle)

    def _store(self, attention: nn.Module, head: int, code: int, gain: float) -> None:
        rows = slice(head * HEAD_DIM, head * HEAD_DIM + CODE)
        attention.v_proj.weight[rows, :IDENTITY] = self.project * math.sqrt(IDENTITY / HIDDEN)
        attention.o_proj.weight[code_slice(code), rows] = torch.eye(CODE) * gain

    def _match(self, attention: nn.Module, head: int, matches: Sequence[Match]) -> None:
        """Score keys by how well their codes agree with the query's; BOS catches the rest."""
        pairs = len(self.slow) // len(matches)
        for number, match in enumerate(matches):
            rows = self._rows(head, number * pairs, (number + 1) * pairs)
            mix = self._mix(len(rows), match.weight * INDUCTION_SCORE)
            self._read(attention.q_proj, rows, match.query, mix)
            self._read(attention.k_proj, rows, match.key, mix)
            attention.q_proj.bias[rows] = INDUCTION_SINK * (mix @ self._bos(match.key))

    def _to_new(self, attention: nn.Module, head: int) -> None:
        """Where OLD stands, add NEW: it stands two after OLD and one after the arrow."""
        self._behind_arrow(attention, head, key=2)
        self._copy(attention, head, self.basis.tensor_split(3)[head], gain=NEW_GAIN)

    def _to_old(self, attention: nn.Module, head: int) -> None:
        """Where NEW stands, let its code become OLD's, so that copying goes on behind it."""
        self._behind_arrow(attention, head, key=0)
        old = torch.arange(CODE) + head * HEAD_DIM
        new = old + CODE
        attention.v_proj.weight[old, code_slice(2)] = torch.eye(CODE)
        attention.v_proj.weight[new, :IDENTITY] = self.project / EMBEDDING_SCALE
        attention.o_proj.weight[:IDENTITY, old] = OLD_GAIN * self.project.T * EMBEDDING_SCALE
        attention.o_proj.weight[:IDENTITY, new] = -self.project.T * EMBEDDING_SCALE

    def _behind_arrow(self, attention: nn.Module, head: int, key: int) -> None:
        """Attend the token behind the arrow if its code `key` is this token's, and BOS if not."""
        slow = len(self.slow)
        rows = self._rows(head, 0, slow - 2)
        mix = self._mix(len(rows), LOOKUP_SCORE)
        self._read(attention.q_proj, rows, 0, mix)
        self._read(attention.k_proj, rows, key, mix)
        arrow, bos = self._rows(head, slow - 2, slow)[:2]
        for row, code, score in (
            (arrow, self._code(self.arrow), ARROW_SCORE),
            (bos, self._bos(1) * BOS_NORM, ARROW_SCORE + LOOKUP_SINK * LOOKUP_SCORE),
        ):
            attention.k_proj.weight[row, code_slice(1)] = code / code.square().sum()
            attention.q_proj.bias[row] = score * math.sqrt(HEAD_DIM)

    def _copy(self, attention: nn.Module, head: int, part: Tensor, gain: float) -> None:
        """Write the embedding of the attended token, as far as `part` [rows, IDENTITY] sees it."""
        rows = torch.arange(len(part)) + head * HEAD_DIM
        attention.v_proj.weight[rows, :IDENTITY] = part
        attention.o_proj.weight[:IDENTITY, rows] = part.T * gain

    def _read(self, linear: nn.Linear, rows: Tensor, back: int, mix: Tensor) -> None:
        if back:
            linear.weight[rows, code_slice(back)] = mix
        else:
            linear.weight[rows, :IDENTITY] = mix @ self.project / EMBEDDING_SCALE

    def _code(self, token: int) -> Tensor:
        table = self.model.model.embed_tokens.weight
        return self.project @ table[token, :IDENTITY] / EMBEDDING_SCALE

    def _bos(self, back: int) -> Tensor:
        table = self.model.model.embed_tokens.weight
        return table[self.model.config.bos_token_id, code_slice(back)]

    def _rows(self, head: int, first: int, last: int) -> Tensor:
        """Return both dimensions of the slowly turning pairs first..last of a head."""
        pairs = self.slow[first:last]
        return torch.cat((pairs, pairs + HEAD_DIM // 2)) + head * HEAD_DIM

    def _mix(self, rows: int, score: float) -> Tensor:
        """Return a random [rows, CODE] matrix that gives two equal codes about this score."""
        size = math.sqrt(score * math.sqrt(HEAD_DIM) / CODE)
        if rows >= CODE:
            return self._orthogonal(rows, CODE) * size
        return self._orthogonal(CODE, rows).T * (size * math.sqrt(CODE / rows))

    def _orthogonal(self, rows: int, columns: int) -> Tensor:
        """Return [rows, columns] with orthonormal columns, rows >= columns."""
        return torch.linalg.qr(torch.randn(rows, columns, generator=self.generator))[0]
