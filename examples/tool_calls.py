"""Questions in, calls of Python functions out: the model picks the function and fills in its arguments.

python examples/tool_calls.py
python examples/tool_calls.py --model Qwen/Qwen2.5-0.5B-Instruct
"""

from __future__ import annotations

import argparse
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM, AutoTokenizer

import lookahead
from lookahead.structured.generate import generate_json
from lookahead.structured.schemas import schema_of

Name = Annotated[str, Field(max_length=30)]


class Weather(BaseModel):
    tool: Literal["weather"]
    city: Name
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]

    def __call__(self) -> str:
        return f"18 degrees in {self.city} on {self.date}"


class Flight(BaseModel):
    tool: Literal["flight"]
    origin: Name
    destination: Name
    departure: Annotated[str, Field(pattern=r"^\d{2}:\d{2}$")]

    def __call__(self) -> str:
        return f"a seat from {self.origin} to {self.destination} at {self.departure}"


QUESTIONS = (
    "Weather: The city is Oslo; the date is 2024-05-03.",
    "Flight: It leaves from Oslo; it goes to Lima; departure is at 17:40.",
    "Flight: It goes to Kyoto; the origin is Porto; departure is at 06:15.",
)


def prompt(tokenizer: Any, question: str) -> Any:
    """Ask as the bundled model was taught to, or in words where the model can chat."""
    if tokenizer.chat_template:
        tools = json.dumps(schema_of(Weather | Flight))
        return [{"role": "user", "content": f"{question}\n\nCall one of these tools, as JSON: {tools}"}]
    tools = {"type": "string", "enum": ["weather", "flight", "order"]}
    schema = {"type": "object", "properties": {"tool": tools}, "required": ["tool"]}
    return f"<facts>\n{question}\n</facts>\n<schema>\n{json.dumps(schema)}\n</schema>\n<json>\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=lookahead.demo_path(), help="a model directory or Hub name")
    name = parser.parse_args(argv).model
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    prompts = [prompt(tokenizer, question) for question in QUESTIONS]
    results = generate_json(model, tokenizer, prompts, Weather | Flight)  # one batch
    for question, result in zip(QUESTIONS, results, strict=True):
        call = result.value
        print(f"{question}\n    {call!r}\n    {call()}")
    print(f"{results[0].trace.tokens_per_pass:.1f} tokens a pass and question")


if __name__ == "__main__":
    main()
