"""Grammars: what they are made of, what may follow a text, and which words a tokenizer has for it."""
