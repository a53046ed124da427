"""Drafts for vLLM: what `speculative_config` names as a `custom_class`.

    LLM(
        model,
        speculative_config={"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": 16},
        additional_config={"lookahead": {"pool": "my-pool"}},
    )

vLLM verifies the drafts and picks the tokens; they make it faster or slower, and change nothing of what it writes.
Written for vLLM 0.32, whose interface for such classes is experimental. It is loaded where the model runs, in the
workers, and needs nothing of this package but the n-grams: llguidance does not have to be there.
"""

from __future__ import annotations

from multiprocessing.util import Finalize
from typing import Any

from numpy.typing import NDArray

from lookahead.chains import Chains, warm_up
from lookahead.cost import assumed_slope
from lookahead.draft import IntArray
from lookahead.errors import InvalidArgument, PoolBusy
from lookahead.pool.pool import Pool
from lookahead.worth import Worth

DRAFTER = "lookahead.integrations.vllm.LookaheadDrafter"
"""How vLLM is told of it."""

KEY = "lookahead"
"""What our settings are called in vLLM's `additional_config`."""

_AUTO, _ALL = "auto", "all"
_DEFAULTS: dict[str, Any] = {"pool": None, "remember": "output", "min_chance": 0.2, "budget": _AUTO}


class LookaheadDrafter:
    """Drafts for all requests of a batch, from what each has written, what others have, and a pool.

    vLLM makes one in every worker. `num_speculative_tokens` is how many tokens are drafted at most; 16 is a good
    number, since drafts are as long as they are likely. Settings, all of them optional, stand in `additional_config`
    under "lookahead":

        pool: a directory, or a list of them; see `Pool`. The first is made if it is not there, and what is generated is
            added to it when a request has ended, by the worker that opens it first; others read it. What is added to
            any of them by other processes is drafted from within some steps.
        remember: "output", "all" or null, see `Lookahead`.
        min_chance: a draft ends where the chance that all of it is accepted falls below this; 0.2.
        budget: "auto", as many drafted tokens as pay by what the engine's steps have taken, or "all" that are likely
            enough.

    Args:
        vllm_config: vLLM's configuration.

    Raises:
        InvalidArgument: a setting that is not known, or out of range.
        PoolError: a directory that cannot be used; see `Pool`.
    """

    def __init__(self, vllm_config: Any) -> None:
        settings = settings_of(vllm_config.additional_config)
        model, most = vllm_config.model_config, vllm_config.speculative_config.num_speculative_tokens
        slope = assumed_slope(vllm_config.device_config.device_type)
        pools = _opened(settings["pool"], model)
        self._chains = Chains(
            most,
            pool=pools,
            remember=settings["remember"],
            min_chance=settings["min_chance"],
            worth=Worth(slope=slope) if settings["budget"] == _AUTO else None,
            vocab_size=model.get_vocab_size(),
        )
        # A worker is told to end, not this object; what pools have not written would be lost.
        self.close = Finalize(self, _close, (self._chains, pools), exitpriority=1)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Compile what drafts, before the first request waits for it."""
        warm_up()

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: NDArray[Any],
        token_ids_cpu: IntArray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Return the drafts of a batch of B requests.

        Args:
            sampled_token_ids: [B] the tokens that were generated just now; none where a prompt is not read to its end.
            num_tokens_no_spec: [at least B] tokens of each request, those included.
            token_ids_cpu: [at least B, longest request] the tokens.
            slot_mappings: not used.
        """
        return self._chains.propose(token_ids_cpu, num_tokens_no_spec, [len(some) for some in sampled_token_ids])


def settings_of(additional_config: Any) -> dict[str, Any]:
    """Return our settings, those that are not given as they are by default.

    Raises:
        InvalidArgument: a setting that is not known, or a `budget` that is none.

    >>> settings_of({"lookahead": {"min_chance": 0.2}})["min_chance"]
    0.2
    """
    given = additional_config.get(KEY, {}) if isinstance(additional_config, dict) else {}
    if not isinstance(given, dict):
        raise InvalidArgument(
            f'additional_config has {KEY}={given!r}; give an object, as in {{"{KEY}": {{"pool": "…"}}}}'
        )
    if unknown := sorted(set(given) - set(_DEFAULTS)):
        raise InvalidArgument(f"additional_config has {KEY}.{unknown[0]}; there are {', '.join(_DEFAULTS)}")
    settings = _DEFAULTS | given
    if settings["budget"] not in (_AUTO, _ALL):
        raise InvalidArgument(f'{KEY}.budget={settings["budget"]!r}; give "{_AUTO}" or "{_ALL}"')
    return settings


def _opened(paths: str | list[str] | None, model: Any) -> list[Pool]:
    """Return the pools, the first of them open for writing unless another process writes it."""
    some = [paths] if isinstance(paths, str) else list(paths or ())
    if not some:
        return []
    tokenizer = _tokenizer(model)
    others = [Pool(path, tokenizer=tokenizer, read_only=True) for path in some[1:]]
    try:
        return [Pool(some[0], tokenizer=tokenizer), *others]
    except PoolBusy:
        return [Pool(some[0], tokenizer=tokenizer, read_only=True), *others]


def _close(chains: Chains, pools: list[Pool]) -> None:
    chains.close()
    for pool in pools:
        pool.close()


def _tokenizer(model: Any) -> Any:
    """Return the tokenizer that pools are checked against; None where vLLM is told to do without."""
    if model.skip_tokenizer_init:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
    )
