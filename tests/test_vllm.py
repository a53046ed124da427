"""The first law inside vLLM: with our drafts it writes what it writes without them. Needs `--vllm PYTHON`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest

import lookahead

ROOT = Path(__file__).parents[1]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "counts": {"type": "array", "items": {"type": "integer"}, "maxItems": 4},
    },
    "required": ["name", "counts"],
    "additionalProperties": False,
}
Run = Any


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that generates in vLLM, in a process of its own."""
    python = request.config.getoption("--vllm")
    if python is None:
        pytest.skip("needs the environment with vLLM: benchmarks/peers.sh vllm, then --vllm .peers/vllm/bin/python")
    kernels = str(tmp_path_factory.mktemp("kernels"))  # compiled by another numba than ours

    def generate(requests: list[dict[str, Any]], system: str, **job: Any) -> dict[str, Any]:
        told = json.dumps({"model": str(lookahead.demo_path()), "requests": requests, "system": system, **job})
        script, environment = ROOT / "benchmarks" / "vllm_batch.py", os.environ | {"NUMBA_CACHE_DIR": kernels}
        done = subprocess.run(
            [python, str(script)], input=told, capture_output=True, text=True, env=environment, cwd=ROOT, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return dict(json.loads(done.stdout))

    generate.kernels = kernels  # type: ignore[attr-defined]
    return generate


def requests(count: int, *, guided: bool) -> list[dict[str, Any]]:
    """Return requests of mixed lengths, some of them the same, those with a schema under it or under another."""
    prompts = json.loads(Path(lookahead.demo_path(), "prompts.json").read_text())
    made = []
    for i in range(count):
        prompt, schema = prompts[i % len(prompts)]["prompt"], None
        if guided and i % 3:
            own = re.search(r"<schema>\n(.*?)\n</schema>", prompt, re.DOTALL)
            schema = json.loads(own.group(1)) if own else SCHEMA
        made.append({"prompt": prompt, "new": 8 + (i * 37) % 120, "schema": schema})
    return made


@pytest.fixture(scope="module", params=[False, True], ids=["free", "guided"])
def plain(request: pytest.FixtureRequest, run: Run) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return 64 requests, and what vLLM makes of them without drafts."""
    some = requests(64, guided=request.param)
    return some, run(some, "plain")


def test_drafts_change_nothing(run: Run, plain: Any) -> None:
    some, without = plain
    drafted = run(some, "lookahead", lookahead={"budget": "all"})
    assert drafted["tokens"] == without["tokens"]
    assert drafted["accepted"] > 0.4 * drafted["drafted"] > 0
    assert drafted["steps"] < 0.6 * without["steps"]


def test_nor_where_requests_wait_and_are_put_off(run: Run, plain: Any, tmp_path: Path) -> None:
    """Few rows at a time, so little room for keys and values that requests are preempted, a pool, the usual budget."""
    some, without = plain
    tight = run(some, "lookahead", batch=12, blocks=18, lookahead={"pool": str(tmp_path / "pool")})
    assert tight["tokens"] == without["tokens"]
    assert tight["preempted"] > 0
    with lookahead.Pool.open(tmp_path / "pool", read_only=True) as pool:
        assert pool.documents > 0


def test_a_second_run_drafts_from_the_pool_of_the_first(run: Run, tmp_path: Path) -> None:
    some, settings = requests(14, guided=False), {"pool": str(tmp_path / "pool"), "budget": "all"}
    first, second = (run(some, "lookahead", processes=True, lookahead=settings) for _ in range(2))
    assert first["tokens"] == second["tokens"]
    assert second["steps"] < first["steps"]


def test_the_program_of_the_page_runs(request: pytest.FixtureRequest, run: Run, tmp_path: Path) -> None:
    """As it stands in docs/vllm.md, with the bundled model."""
    page = (ROOT / "docs" / "vllm.md").read_text("utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    program = program.replace('"path/to/model",', f'"{lookahead.demo_path()}", enforce_eager=True,')
    (tmp_path / "page.py").write_text(f'if __name__ == "__main__":\n{textwrap.indent(program, "    ")}')
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "NUMBA_CACHE_DIR": run.kernels}
    done = subprocess.run(
        [Path(request.config.getoption("--vllm")).absolute(), "page.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "import" in done.stdout.splitlines()[-1] or "import" in done.stdout
    assert (tmp_path / "my-pool" / "manifest.json").is_file()


def test_a_bad_setting_is_named(request: pytest.FixtureRequest, run: Run) -> None:
    with pytest.raises(AssertionError, match=r"additional_config has lookahead\.pol; there are pool, remember"):
        run(requests(1, guided=False), "lookahead", lookahead={"pol": "x"})
