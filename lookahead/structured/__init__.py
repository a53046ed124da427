"""Values instead of text: prompts, schemas of Python types, results, streams, memory."""
