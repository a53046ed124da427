"""A model's own `generate`: put this file into `custom_generate/` in the model's directory.

`from_pretrained(directory, trust_remote_code=True)` then makes `model.generate(…)` call it.
"""

import threading

import lookahead

KEPT = threading.local()  # a Lookahead belongs to one thread


def generate(model, *arguments, **options):
    """Do what `model.generate` does; drafts are learnt from call to call."""
    if getattr(KEPT, "model", None) is not model:
        KEPT.model, KEPT.lookahead = model, lookahead.Lookahead(model)
    return KEPT.lookahead.generate(*arguments, **options)
