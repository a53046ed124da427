"""A drafter of your own: it may be wrong at will, the output stays what plain `generate()` writes.

python examples/own_drafter.py
"""

from __future__ import annotations

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

import lookahead
from lookahead.draft import IntArray


class LastLine(lookahead.Drafter):
    """Drafts that the previous line comes again, and next to it that the line just ends."""

    def __init__(self, newline: int) -> None:
        self.newline = newline

    def propose(self, context: IntArray, budget: int) -> lookahead.Draft:
        """Return two branches under the last token."""
        last = int(context[-1])
        ends = np.flatnonzero(context == self.newline)
        line = context[ends[-2] + 1 : ends[-1]].tolist() if len(ends) > 1 else []
        again = lookahead.Draft.chain([last, *line[: budget - 1]], weight=0.5)
        ends_here = lookahead.Draft.chain([last, self.newline], weight=0.2)
        return lookahead.Draft.merge([again, ends_here])


def main() -> None:
    path = lookahead.demo_path()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    inputs = tokenizer("import os\nimport re\nimport sys\n", return_tensors="pt")
    la = lookahead.Lookahead(model, drafter=LastLine(tokenizer("\n").input_ids[-1]))
    output = la.generate(**inputs, max_new_tokens=48)
    same = output.equal(model.generate(**inputs, max_new_tokens=48))
    assert la.last is not None
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print(f"--- {la.last.tokens_per_pass:.2f} tokens a pass, the same as plain generate(): {same}")


if __name__ == "__main__":
    main()
