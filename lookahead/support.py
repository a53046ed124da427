"""Whether, and how, a model is served: what its config says, tried out on the model itself where nobody has before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import MoEModelOutput

from lookahead.attention import implementation_of
from lookahead.cache import joined, opened
from lookahead.draft import Draft
from lookahead.errors import LookaheadError, UnsupportedModel
from lookahead.families import INSTEAD, TRIED, Family, device_of, families_of, require_usable, text_config, vocabulary
from lookahead.target import Target

PADDING, _READ = 3, 8  # tokens; and those that an encoder has read
PROMPT, WINDOW = 14, 6  # tokens of the check; how far windows and chunks reach in it, so that they matter
EXACT, ROUGH = (1e-3, 2e-3), (0.1, 0.3)
"""Differences of logits over their spread, in 32 bits and in 16: what is rounding anyhow, and what is none any more."""
_WINDOWS = ("sliding_window", "attention_chunk_size")
_NOISE = 4.0  # times what `transformers` itself differs between many tokens in a pass and one


@dataclass(frozen=True, slots=True)
class Support:
    """How a model is served.

    Attributes:
        kind: "tree", "linear" (drafts are chains), or "refused".
        reason: why it is not better, in words; "" for trees.
        checked: whether that was tried out on the model itself.
        difference: largest difference of logits between a draft and single tokens, over their spread, as measured.
    """

    kind: Literal["tree", "linear", "refused"]
    reason: str = ""
    checked: bool = False
    difference: float | None = None
    family: Family | None = field(default=None, repr=False)


def supports(model: Any) -> Support:
    """Say how `model` is served. Never raises because of the model.

    The first time, an architecture that is not well known runs a few hundred tokens, in which its windows of attention
    are short: no other thread may use it then. The answer is kept with the model.

    >>> lookahead.supports(model).kind
    'tree'
    """
    if not isinstance(model, GenerationMixin):
        return Support("refused", f"{type(model).__name__} cannot be served: it cannot generate()")
    try:
        require_usable(model, prompt=1, longest=1)
    except UnsupportedModel as error:
        return Support("refused", str(error))
    return _known(model)


def family_of(model: Any) -> Family:
    """Return how drafts run through `model`.

    Raises:
        UnsupportedModel: they do not.
    """
    found = _known(model)
    if found.family is None:
        raise UnsupportedModel(found.reason)
    return found.family


_FOUND: WeakKeyDictionary[Any, dict[Any, Support]] = WeakKeyDictionary()
_ONE_AT_A_TIME = RLock()


def _known(model: Any) -> Support:
    """Return what was found out about `model` as it is loaded."""
    config = text_config(model)
    way = (implementation_of(config), model.dtype, *(getattr(config, name, None) for name in _WINDOWS))
    with _ONE_AT_A_TIME:
        found = _FOUND.setdefault(model, {})
        if way not in found:
            found[way] = _judge(model)
        return found[way]


def _judge(model: Any) -> Support:
    try:
        families = families_of(model)
    except UnsupportedModel as error:
        return Support("refused", str(error))
    if model.config.model_type in TRIED and not is_quantized(model):
        return Support("tree", family=families[0])
    devices = [device for device in {one.device for one in model.parameters()} if device.type == "cuda"]
    with torch.random.fork_rng(devices):
        before = _generators(devices)
        try:
            with torch.no_grad(), _short_windows(text_config(model)):
                found = _tried(model, families_of(model), families)
        except Exception as error:
            reason = f"a trial of it failed ({_said(error)})"
            return Support("refused", f"{type(model).__name__} cannot be served: {reason}; {INSTEAD}")
        drawn = not all(map(torch.equal, before, _generators(devices)))
    if drawn and found.kind != "refused":
        reason = "its passes draw random numbers, which sampling would lack where drafts save passes"
        return Support("refused", f"{type(model).__name__} cannot be served: {reason}; {INSTEAD}", True)
    return found


def _generators(devices: Sequence[torch.device]) -> list[Tensor]:
    """Return the states of the random generators of the CPU and of CUDA `devices`."""
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]


def is_quantized(model: Any) -> bool:
    """Whether weights or activations are quantized: then rounding may depend on how many tokens a pass has."""
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        return True
    return any(type(module).__module__.startswith(("torch.ao.", "torchao.")) for module in model.modules())


def _said(error: Exception) -> str:
    """Return the first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _tried(model: Any, shortened: Sequence[Family], families: Sequence[Family]) -> Support:
    """Return the first of the families that gives the logits of single tokens, behind padding too."""
    name, first = type(model).__name__, families[0]
    paddings = (0,) if first.encoder else (0, PADDING)  # few pad what a decoder starts with
    try:
        trials = [Trial(model, first, padding) for padding in paddings]
    except Exception as error:
        reason = f"transformers itself cannot run several tokens behind a cache in one pass ({_said(error)})"
        return Support("refused", f"{name} cannot be served: {reason}; {INSTEAD}", True)
    trials = [trial for trial in trials if not (trial.padding and trial.undefined)]
    unsure = len(families) > 1 and families[1].last is not None
    padded = [Trial(model, first, 0, within=families[1].last)] if unsure else []
    for trial in trials:
        if not trial.noise <= trial.limit:
            reason = f"passes over several tokens differ from passes over one by {trial.noise:.2g} of the spread of the"
            return Support("refused", f"{name} cannot be served: {reason} logits; {INSTEAD}", True, trial.noise)
    differences: list[float] = []
    allowed = max(trial.allowed for trial in trials)
    for short, family in zip(shortened, families, strict=True):
        asked = trials + (padded if family.last is None else [])
        each = [trial.difference(short) for trial in asked]
        if max(each) <= allowed:
            reason = "" if family.shape == "tree" else _why_linear(family, differences)
            return Support(family.shape, reason, True, max(each), family)
        differences.append(max(each))
    worst = min(differences)
    reason = f"{name} cannot be served: drafts change its logits by {worst:.2g} of their spread; {INSTEAD}"
    return Support("refused", reason, True, worst)


def _why_linear(family: Family, differences: Sequence[float]) -> str:
    """Return why drafts have to be chains, from the differences that trees made."""
    if family.state:
        return "its layers keep a state, which cannot branch"
    if family.encoder or not family.positions:
        return "it is given no position_ids, so that two tokens cannot stand at one place"
    if min(differences) == float("inf"):
        return "it takes no mask for single tokens"
    return f"a tree mask changes its logits by {min(differences):.2g} of their spread"


class Trial:
    """A short text, run token by token and as drafts.

    Args:
        family: how the model is run plainly: with positions, with an encoder.
        padding: tokens of padding before the text.
        within: a token that the text has, that is not in other texts; None: none.

    Attributes:
        allowed: difference of logits that may be noise.
        undefined: whether single tokens have logits that are no numbers, as behind padding in some models.
        limit: differences that are no noise any more, for the model's dtype.
        noise: how much `transformers` itself differs, over the spread of the logits.
    """

    # Node by node: the root, two branches under it, and what was drafted under the second one in the next pass.
    _PARENTS = (-1, 0, 0, 1, 2, 4)
    _LEAVES, _KEPT = (3, 5), (0, 2, 4)

    def __init__(self, model: Any, family: Family, padding: int, *, within: int | None = None) -> None:
        self._model, self._family, self._positions, self.padding = model, family, family.positions, padding
        vocab, weight = vocabulary(model), model.get_input_embeddings().weight
        device = device_of(model)
        # What an encoder says needs no encoder here: any states do, and it may read sounds or pictures.
        self._encoder = _encoded(text_config(model), weight.dtype, device) if family.encoder else {}
        unwanted = getattr(text_config(model), "pad_token_id", None)
        known = np.array([token for token in range(vocab) if token != unwanted])
        tokens = np.random.default_rng(0).choice(known, 32, replace=vocab <= 32)
        self._prompt = torch.from_numpy(np.append(tokens[:padding], tokens[:PROMPT])[None]).to(device)
        self._tokens = [int(token) for token in tokens[PROMPT : PROMPT + len(self._PARENTS)]]
        self._later = [int(token) for token in tokens[-3:]]
        if within is not None:
            self._tokens[self._KEPT[1]] = within
            self._later[1] = within
        tree = Draft(np.array(self._tokens), np.array(self._PARENTS))
        alone: dict[int, Tensor] = {}
        for leaf in self._LEAVES:
            path = tree.path(leaf)
            alone |= dict(zip(path, self._stepped([self._tokens[node] for node in path]), strict=True))
        self._alone = [alone[node] for node in range(len(tree))]
        chain = [*(self._tokens[node] for node in self._KEPT), *self._later]
        self._chain = self._stepped(chain)
        self.spread = float(torch.stack(self._chain).float().std())
        rounding, self.limit = EXACT if weight.dtype in (torch.float32, torch.float64) else ROUGH
        self.noise = self._apart(self._at_once(chain), self._chain)
        self.undefined = not bool(torch.stack([*self._chain, *self._alone]).isfinite().any(-1).all())
        self.allowed = min(max(rounding, _NOISE * self.noise), self.limit)

    def difference(self, family: Family) -> float:
        """Return how much logits of drafts differ from those of single tokens; infinite where drafts do not run."""
        try:
            found, expected = (self._as_tree if family.shape == "tree" else self._as_chain)(family)
        except LookaheadError:
            raise
        except Exception:  # a mask of the wrong kind fails in as many ways as there are models
            return float("inf")
        return self._apart(found, expected)

    def _as_tree(self, family: Family) -> tuple[list[Tensor], list[Tensor]]:
        target = self._target(family)
        first = target.forward([Draft(np.array(self._tokens), np.array(self._PARENTS))], [0])[0]
        target.keep([list(self._KEPT)])
        second = target.forward([Draft.chain(self._later)], [len(self._KEPT)])[0]
        return [*first, *second], [*self._alone, *self._chain[len(self._KEPT) :]]

    def _as_chain(self, family: Family) -> tuple[list[Tensor], list[Tensor]]:
        target = self._target(family)
        first = target.forward([Draft.chain([self._tokens[node] for node in self._KEPT] + self._tokens[:2])], [0])[0]
        target.keep([list(range(len(self._KEPT)))])
        second = target.forward([Draft.chain(self._later)], [len(self._KEPT)])[0]
        return [*first[: len(self._KEPT)], *second], self._chain

    def _target(self, family: Family) -> Target:
        own, cross = self._fresh()
        cache = opened(own)
        self._plain(self._prompt, joined(cache, cross))
        last = torch.tensor([PROMPT - 1 if self._positions else self._prompt.shape[1] - 1])
        mask = self._mask(0) > 0 if self.padding else None
        return Target(self._model, family, cache, mask, last, 16, encoder=self._encoder, cross=cross)

    def _fresh(self) -> tuple[DynamicCache, DynamicCache | None]:
        """Return the caches that `generate()` makes: of the text, and of what an encoder says."""
        config = text_config(self._model)
        return DynamicCache(config=config), DynamicCache(config=config) if self._encoder else None

    def _stepped(self, tokens: Sequence[int]) -> list[Tensor]:
        """Return the logits behind each of `tokens`, run one by one behind the prompt."""
        cache, ids = joined(*self._fresh()), self._prompt.new_tensor([tokens])
        self._plain(self._prompt, cache)
        return [self._plain(ids[:, i : i + 1], cache, i)[-1] for i in range(len(tokens))]

    def _at_once(self, tokens: Sequence[int]) -> list[Tensor]:
        """Return them as `transformers` computes them in one pass."""
        cache = joined(*self._fresh())
        self._plain(self._prompt, cache)
        return list(self._plain(self._prompt.new_tensor([tokens]), cache, 0))

    def _plain(self, ids: Tensor, cache: Any, start: int | None = None) -> Tensor:
        """Return the logits [N, V] of a pass as `generate()` makes it: `start` tokens behind the prompt, or over it"""
        given: dict[str, Any] = dict(self._encoder)
        given["decoder_input_ids" if self._encoder else "input_ids"], length = ids, ids.shape[1]
        if self.padding:
            given["attention_mask"] = self._mask(0 if start is None else start + length)
        if self._positions:
            first = 0 if start is None else self._prompt.shape[1] + start
            places = torch.arange(first, first + length, device=ids.device)[None] - self.padding
            given["position_ids"] = places.clamp(min=0)
        logits: Tensor = self._model(**{self._family.cache: cache}, use_cache=True, **given).logits[0]
        return logits

    def _mask(self, generated: int) -> Tensor:
        """Return [1, S], 0 where there is padding."""
        mask = self._prompt.new_ones((1, self._prompt.shape[1] + generated))
        mask[:, : self.padding] = 0
        return mask

    def _apart(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        difference = float((torch.stack(list(found)).float() - torch.stack(list(expected)).float()).abs().max())
        return difference / max(self.spread, 1e-12) if difference == difference else float("inf")


def _encoded(config: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the outputs of an encoder that has read something."""
    width = int(getattr(config, "d_model", None) or config.hidden_size)
    states = torch.linspace(-1, 1, _READ * width, dtype=dtype, device=device).view(1, _READ, width)
    return {"encoder_outputs": MoEModelOutput(last_hidden_state=states.sin())}


@contextmanager
def _short_windows(config: Any) -> Iterator[None]:
    """Let windows and chunks of attention be short meanwhile, so that a short text tells whether they are kept."""
    before = {
        name: getattr(config, name)
        for name in _WINDOWS
        if isinstance(getattr(config, name, None), int) and getattr(config, name) > WINDOW
    }
    try:
        for name in before:
            setattr(config, name, WINDOW)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
