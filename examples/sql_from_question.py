"""A question in, a SELECT statement out, which is valid SQL whatever the model; then SQLite runs it.

The bundled model can only rename: it is given a query for another table layout, and the column that is called otherwise
here. A model that can chat is asked the question.

python examples/sql_from_question.py
python examples/sql_from_question.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct
"""

from __future__ import annotations

import argparse
import sqlite3
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import lookahead
from lookahead.errors import IncompleteText
from lookahead.structured.generate import generate_grammar

TABLE = "CREATE TABLE orders (customer TEXT, city TEXT, amount REAL)"
ROWS = (("Nora", "Oslo", 318.45), ("Hugo", "Lima", 64.2), ("Mei", "Oslo", 977.15), ("Hugo", "Lima", 41.0))
QUESTIONS = {
    "Which orders are above 60, the largest first?": (
        "SELECT customer, total FROM orders WHERE total > 60 ORDER BY total DESC;"
    ),
    "How much did each customer spend?": (
        "SELECT customer, sum(total) FROM orders\n    GROUP BY customer\n    ORDER BY sum(total) DESC;"
    ),
}


def prompt(tokenizer: Any, question: str) -> Any:
    """Ask as the bundled model was taught to, or in words where the model can chat."""
    if tokenizer.chat_template:
        return [{"role": "user", "content": f"{TABLE};\n\nAnswer with one SQLite query: {question}"}]
    return f"rename total -> amount\n<code>\n{QUESTIONS[question]}\n</code>\n<code>\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=lookahead.demo_path(), help="a model directory or Hub name")
    name = parser.parse_args(argv).model
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    database = sqlite3.connect(":memory:")
    database.execute(TABLE)
    database.executemany("INSERT INTO orders VALUES (?, ?, ?)", ROWS)
    grammar = lookahead.Grammar.named("sql_select")
    for question in QUESTIONS:
        try:
            result = generate_grammar(model, tokenizer, prompt(tokenizer, question), grammar, max_new_tokens=200)
        except IncompleteText as error:
            print(f"{question}\n{error.text}    -- cut off", end="\n\n")
            continue
        print(f"{question}\n{result.value}    -- {result.trace.tokens_per_pass:.1f} tokens a pass")
        try:
            print(database.execute(result.value).fetchall(), end="\n\n")
        except sqlite3.Error as error:  # a column that is not there: the grammar knows SQL, not this table
            print(f"SQLite: {error}", end="\n\n")
    database.close()


if __name__ == "__main__":
    main()
