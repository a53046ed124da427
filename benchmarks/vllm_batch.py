"""Generate a batch of requests in vLLM on a CPU, with our drafts or with its own; run by the Python that has vLLM.

    echo JOB | .peers/vllm/bin/python benchmarks/vllm_batch.py

JOB is one JSON object: "model", a directory; "requests", a list of {"prompt": text or token ids, "new": most tokens,
"schema": a JSON Schema or null}; "system", "plain", "ngram", "suffix" or "lookahead"; and what may be left out:

    draft      tokens drafted at most ("ngram" 8, "suffix" 32, "lookahead" 16)
    lookahead  the settings of our drafter
    rounds     how often all requests are generated (1)
    batch      requests at a time (64)
    dtype      of the model ("float32"); threads (2); blocks of the key-value cache (as many as fit)
    processes  whether scheduler and model run in processes of their own, as a server's do (false)
    compile    whether the model is compiled (false)

The answer, on standard output, is another: "tokens" of every request and "seconds" of every round, "steps" of the
engine, and what vLLM's own metrics say: "drafts", "drafted", "accepted", and "positions", how many were accepted of
each position.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lookahead" / "bench"))

from vllm_run import JSON_STYLE, drafts, ends, environment

DEFAULTS: dict[str, Any] = {"dtype": "float32", "threads": 2, "rounds": 1, "batch": 64, "processes": False}
DEFAULTS |= {"compile": False, "cache_gb": 1, "blocks": None, "lookahead": {}}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Boot vLLM, generate, and return the answer."""
    from vllm import LLM

    begin = time.perf_counter()
    llm = LLM(
        job["model"],
        dtype=job["dtype"],
        enable_prefix_caching=False,
        enforce_eager=not job["compile"],
        disable_log_stats=False,
        max_num_seqs=job["batch"],
        num_gpu_blocks_override=job["blocks"],
        structured_outputs_config={"backend": "guidance", "disable_any_whitespace": True},
        speculative_config=drafts(job),
        additional_config={"lookahead": job["lookahead"]} if job["system"] == "lookahead" else {},
    )
    booted = time.perf_counter() - begin
    params = [_params(request, ends(Path(job["model"]))) for request in job["requests"]]
    prompts = [_prompt(request) for request in job["requests"]]
    seconds, tokens = [], []
    for _ in range(job["rounds"]):
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - begin)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
    answer = {"tokens": tokens, "seconds": seconds, "booted": booted, **_metrics(llm)}
    llm.llm_engine.engine_core.shutdown()
    return answer


def _prompt(request: dict[str, Any]) -> Any:
    prompt = request["prompt"]
    return {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}


def _params(request: dict[str, Any], end: list[int]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    schema = request.get("schema")
    structured = None if schema is None else StructuredOutputsParams(json=schema | {"x-guidance": JSON_STYLE})
    return SamplingParams(
        temperature=0, max_tokens=request["new"], stop_token_ids=end, detokenize=False, structured_outputs=structured
    )


def _metrics(llm: Any) -> dict[str, Any]:
    found = {metric.name.removeprefix("vllm:"): metric for metric in llm.get_metrics()}
    names = {"drafts": "drafts", "drafted": "draft_tokens", "accepted": "accepted_tokens"}
    counts = {name: getattr(found.get(f"spec_decode_num_{of}"), "value", 0) for name, of in names.items()}
    positions = getattr(found.get("spec_decode_num_accepted_tokens_per_pos"), "values", [])
    preempted = getattr(found.get("num_preemptions"), "value", 0)
    return counts | {"positions": positions, "steps": found["iteration_tokens_total"].count, "preempted": preempted}


def main() -> None:
    text = sys.stdin.read()
    job = DEFAULTS | json.loads(text)
    if job["system"] in ("ngram", "suffix", "lookahead"):
        job = {
            "draft": {"ngram": 8, "suffix": 32, "lookahead": 16}[job["system"]],
            "lookup": [2, 5],
            "kept": 10_000,
        } | job
    wanted = environment(job)
    if any(os.environ.get(name) != value for name, value in wanted.items()):  # some must be there before Python is
        again = subprocess.run([sys.executable, *sys.argv], input=text, text=True, env=os.environ | wanted, check=False)
        sys.exit(again.returncode)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM prints goes to standard error
    json.dump(run(job), out)
    out.flush()


if __name__ == "__main__":
    main()
