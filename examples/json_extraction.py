"""Facts and a JSON Schema in, a Python object out, with the bundled model.

python examples/json_extraction.py
"""

from __future__ import annotations

import json

from transformers import AutoModelForCausalLM, AutoTokenizer

import lookahead

SCHEMA = {
    "type": "object",
    "properties": {"host": {"type": "string"}, "port": {"type": "integer"}, "healthy": {"type": "boolean"}},
    "required": ["host", "port", "healthy"],
}
FACTS = (
    "A new server: It listens on port 8425; the host is called falcon; it is healthy.",
    "This is about a server: The host is called heron; it is not healthy; it listens on port 5190.",
)


def main() -> None:
    path = lookahead.demo_path()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    la = lookahead.Lookahead(model, tokenizer)
    for facts in FACTS:
        prompt = f"<facts>\n{facts}\n</facts>\n<schema>\n{json.dumps(SCHEMA)}\n</schema>\n<json>\n"
        inputs = tokenizer(prompt, return_tensors="pt")
        output = la.generate(**inputs, max_new_tokens=96)
        text = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        assert la.last is not None
        print(json.loads(text), f"({la.last.tokens_per_pass:.1f} tokens a pass)")


if __name__ == "__main__":
    main()
