"""A JSON value as it grows."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from lookahead.structured.partial import partial_json, same

if TYPE_CHECKING:
    from lookahead.structured.results import Result

Tokens = list[int]
Generate = Callable[[Any], Callable[[], "Result[Any]"]]
"""Generates with a streamer, and returns what gives the result, or raises why there is none."""

_NOTHING = object()  # equal to no value


class JsonStream(Iterator[Any]):
    """An iterator over the value of one request while it is generated in a thread of its own.

    Every value differs from the one before: first dictionaries, lists and strings that grow, at last the value that
    `generate_json` returns. `close()`, the end of a `with` block, or letting go of the iterator stops the generation
    and waits for its thread.

    Attributes:
        result: the `Result`, when the iterator is at its end; before, None.

    Raises:
        IncompleteJson, InvalidValue, …: in `next()`, what `generate_json` raises.
    """

    def __init__(self, generate: Generate, decode: Callable[[Tokens], str]) -> None:
        self._results: list[Result[Any]] = []
        self._values = _values(generate, decode, self._results)

    @property
    def result(self) -> Result[Any] | None:
        """The `Result`, once the stream has ended."""
        return self._results[0] if self._results else None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._values)

    def close(self) -> None:
        """Stop the generation; wait until its thread has ended."""
        self._values.close()

    def __enter__(self) -> JsonStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Closed(BaseException):
    """Ends a generation that nobody waits for."""


class _Feed:
    """A streamer that hands tokens to another thread.

    Attributes:
        items: lists of tokens; then the one function that returns or raises what came of it.
    """

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.closed = threading.Event()
        self._in_prompt = True

    def put(self, tokens: Any) -> None:
        if self.closed.is_set():
            raise _Closed
        if not self._in_prompt:
            self.items.put(tokens.flatten().tolist())
        self._in_prompt = False

    def end(self) -> None:
        pass

    def fill(self, generate: Generate) -> None:
        """Run `generate` with this streamer."""
        try:
            self.items.put(generate(self))
        except BaseException as error:
            failure = error

            def fail() -> Any:
                raise failure

            self.items.put(fail)


def _values(generate: Generate, decode: Callable[[Tokens], str], results: list[Result[Any]]) -> Generator[Any]:
    feed = _Feed()
    last: Any = _NOTHING
    tokens: Tokens = []
    worker = threading.Thread(target=feed.fill, args=(generate,), name="lookahead-stream", daemon=True)
    worker.start()
    try:
        while isinstance(item := feed.items.get(), list):
            tokens.extend(item)
            value = partial_json(decode(tokens))
            if value is not None and not same(value, last):
                last = copy.deepcopy(value)  # whoever gets the value may change it
                yield value
        result = item()
        results.append(result)
        if not same(result.value, last):
            yield result.value
    finally:
        feed.closed.set()
        worker.join()
