"""Passes of fixed shapes: what a CUDA graph needs, and what makes an output independent of its drafts."""
