"""For test suites of your own: that drafts change nothing about your model, and drafters that look for trouble.

`assert_exact` runs a call of `generate()` plainly and with drafts, and compares all that a caller can see. `calls` and
`drafters` are strategies for `hypothesis`: `pip install lookahead-decoding[test]`.
"""

from lookahead.testing.exact import assert_exact
from lookahead.testing.oracles import Adversary, Oracle
from lookahead.testing.outcome import Outcome, cache_difference, difference
from lookahead.testing.strategies import calls, drafters

__all__ = ["Adversary", "Oracle", "Outcome", "assert_exact", "cache_difference", "calls", "difference", "drafters"]
