"""Letters in, invoices out: as pydantic objects, and the first one again while it is written.

python examples/extract_invoice.py
python examples/extract_invoice.py --model Qwen/Qwen2.5-0.5B-Instruct
"""

from __future__ import annotations

import argparse
import json
from typing import Any, Literal

from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lookahead
from lookahead.structured.generate import generate_json, stream_json
from lookahead.structured.schemas import schema_of


class Invoice(BaseModel):
    order_id: str
    customer: str
    items: list[str]
    total: float
    status: Literal["open", "paid", "shipped"]


LETTERS = (
    "Order: The customer is Nora Fischer; the order id is RK-2417; it holds lamp, kettle and mirror. "
    "The total comes to 318.45; the status is paid.",
    "An order: Placed by Hugo Silva; order TB-905; the items are scarf and violin. "
    "The status is open; the total is 64.20.",
    "A new order: The order id is MA-3380; the customer is Mei Wong; it holds piano and paper. "
    "The total is 977.15; it is shipped.",
)


def prompt(tokenizer: Any, letter: str) -> Any:
    """Ask as the bundled model was taught to, or in words where the model can chat."""
    schema = schema_of(Invoice)
    if tokenizer.chat_template:
        return [
            {"role": "user", "content": f"Extract the invoice as JSON.\n\n{letter}\n\nSchema: {json.dumps(schema)}"}
        ]
    fields = {"type": "object", "properties": schema["properties"], "required": schema["required"]}
    return f"<facts>\n{letter}\n</facts>\n<schema>\n{json.dumps(fields)}\n</schema>\n<json>\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=lookahead.demo_path(), help="a model directory or Hub name")
    name = parser.parse_args(argv).model
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    for letter in LETTERS:
        result = generate_json(model, tokenizer, prompt(tokenizer, letter), Invoice)
        print(f"{result.value!r}\n    {result.trace.tokens_per_pass:.1f} tokens a pass")
    print("\nThe first one again, as it grows:")
    for value in stream_json(model, tokenizer, prompt(tokenizer, LETTERS[0]), Invoice):
        print(value)


if __name__ == "__main__":
    main()
