"""A Python function that is valid Python whatever the model; compiled, and with --call called.

The bundled model can only rename: it is given a function and the variable to rename. A model that can chat is asked for
a function.

python examples/python_function.py --call
python examples/python_function.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct
"""

from __future__ import annotations

import argparse
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import lookahead
from lookahead.errors import IncompleteText
from lookahead.structured.generate import generate_grammar

CODE = """\
def mean(values):
    total = 0
    for value in values:
        total += value
    if not values:
        return None
    return total / len(values)
"""


def prompt(tokenizer: Any) -> Any:
    """Ask as the bundled model was taught to, or in words where the model can chat."""
    if tokenizer.chat_template:
        task = "Write a Python function mean(values); it returns None for an empty list. Answer with code only."
        return [{"role": "user", "content": task}]
    return f"rename total -> amount\n<code>\n{CODE}</code>\n<code>\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=lookahead.demo_path(), help="a model directory or Hub name")
    parser.add_argument("--call", action="store_true", help="call the function: it is code that a model wrote")
    args = parser.parse_args(argv)
    name = args.model
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    grammar = lookahead.Grammar.named("python")
    try:
        result = generate_grammar(model, tokenizer, prompt(tokenizer), grammar, max_new_tokens=300)
    except IncompleteText as error:
        print(f"{error.text}\n--- cut off after {error.trace.tokens} tokens")
        return
    print(result.value)
    code = compile(result.value, "generated", "exec")
    print(f"--- compiles; {result.trace.tokens_per_pass:.1f} tokens a pass")
    if args.call:
        names: dict[str, Any] = {}
        exec(code, names)
        print(f"mean([1, 2, 6]) = {names['mean']([1, 2, 6])}")


if __name__ == "__main__":
    main()
