"""Benchmarks beside other programs, which run in environments of their own.

`lade_run.py` and `vllm_run.py` are started there as scripts, with this folder first on the module path: a file here
must not bear the name of a module that they or their libraries import (no `types.py`, `queue.py`, `token.py`, …), and
what they import from here must not import `lookahead`.
"""
