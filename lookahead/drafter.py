"""The outer interface of whatever proposes drafts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

from lookahead.draft import Draft, FloatArray, IntArray
from lookahead.grammar.matcher import Matcher
from lookahead.sources.noise import Noise
from lookahead.trace import Step


class Drafter(ABC):
    """Proposes token trees for one batch row; may be wrong at will, since a draft is only ever compared.

    Bring your own by writing `propose`. A drafter that keeps state per row overrides `start` and returns a fresh
    object for each row; what should outlive a request stays in the drafter that the user holds.

    Attributes:
        probes: probe nodes that a draft may have beyond its budget; of the object that `start` returned.
        floors: [budget + 1] float32, set before `propose`: the path weight below which a node would not be run when so
            many are there already, root included; None: not known. A drafter may stop there.
        random: whether it may draw random numbers of torch; the generator is put back after it.
        costs: seconds that single sources took in the last pass, by name, where that is measured; for traces only.
    """

    probes: int = 0
    floors: FloatArray | None = None
    random: bool = True
    costs: Mapping[str, float] = MappingProxyType({})

    def start(self, context: IntArray) -> Drafter:
        """Return the drafter of one row whose context so far is `context` ([L] int32, padding left out)."""
        return self

    def obey(self, matcher: Matcher) -> bool:
        """Take notice of the grammar that this row's text follows.

        Called once, on what `start` returned. `matcher` is settled on the text so far whenever `propose` is called.

        Returns:
            Whether all that is proposed will be allowed; otherwise the caller prunes it.
        """
        return False

    def foresee(self, noise: Noise) -> bool:
        """Take notice of the noise that this row's tokens will be drawn with.

        Called once, on what `start` returned, where tokens are sampled and the noise is known ahead. What `noise` shows
        moves on with the text.

        Returns:
            Whether it looks at it; otherwise nothing is drawn ahead.
        """
        return False

    @abstractmethod
    def propose(self, context: IntArray, budget: int) -> Draft:
        """Return a draft of at most `budget` nodes below the root.

        Args:
            context: [L] int32, prompt and committed tokens of this row, of which there may be none yet; `context[-1]`
                is the draft's node 0. A read-only view that is valid during the call only.
            budget: nodes that the step may spend; what is above it is cut by path weight.
        """

    def observe(self, step: Step) -> None:  # noqa: B027 - learning is optional
        """Learn from a verified step, after its tokens are committed; called once for every draft that was proposed.

        Where drafting has not paid lately, some passes run without a draft, and `context` then goes further than the
        last step did.
        """
