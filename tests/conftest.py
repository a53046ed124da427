"""Options, profiles and skips of the suite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
import transformers

LAW_EXAMPLES = 300

pytest.register_assert_rewrite("law")


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("law", "the first law: drafting never changes the output")
    group.addoption(
        "--law-examples", type=int, default=LAW_EXAMPLES, metavar="N", help="random cases (default: %(default)s)"
    )
    group.addoption("--write-page", action="store_true", help="write the table of docs/families.md anew")
    group.addoption("--vllm", metavar="PYTHON", help="of the environment with vLLM: run the tests inside of it too")
    group.addoption("--law-seed", type=int, default=None, metavar="S", help="draw other cases than the fixed ones")


def pytest_configure(config: Any) -> None:
    seed, examples = config.getoption("--law-seed"), config.getoption("--law-examples")
    fixed = {"deadline": None, "database": None, "print_blob": True}
    profile = hypothesis.settings.register_profile
    profile("lookahead", derandomize=True, **fixed)
    profile("law", derandomize=seed is None, max_examples=examples, **fixed)
    profile("side_law", derandomize=seed is None, max_examples=max(10, min(examples // 5, 200)), **fixed)
    profile("third_law", derandomize=seed is None, max_examples=max(10, examples // 3), **fixed)
    hypothesis.settings.load_profile("lookahead")
    if seed is not None:
        hypothesis.core.global_force_seed = seed
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # tiny tensors; more threads only wait for each other


def pytest_collection_modifyitems(items: list[Any]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def many_recordings() -> Iterator[None]:
    """More models are recorded than a process should."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lookahead.recording._MOST", 10**6)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands find none of what they keep in the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
