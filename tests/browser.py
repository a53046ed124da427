"""A headless Chromium that tests drive by the WebDriver protocol, which is JSON over HTTP: it needs no package."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
MISSING = "needs chromium and chromedriver on PATH (Debian: apt install chromium-driver)"
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
KEYS = {"left": "\ue012", "right": "\ue014", "home": "\ue011", "end": "\ue010", "tab": "\ue004", "escape": "\ue00c"}
PATIENCE = 30.0


class Browser:
    """One tab.

    Args:
        port: where chromedriver listens.
        profile: an empty directory.
    """

    def __init__(self, port: int, profile: str) -> None:
        self._port, self._session = port, ""
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{answer['sessionId']}"

    def close(self) -> None:
        self._call("DELETE", "")

    def open(self, file: Path) -> None:
        """Open a page of this machine and wait until it is loaded."""
        self.complaints()
        self._call("POST", "/url", {"url": file.as_uri()})

    def run(self, script: str, *values: Any) -> Any:
        """Return what `script`, the body of a function with these arguments, returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(values)})

    def wait(self, condition: str, *values: Any) -> None:
        """Wait until the expression `condition` is true in the page."""
        wait_until(lambda: self.run(f"return Boolean({condition})", *values), condition)

    @contextmanager
    def inside(self, frame: str) -> Iterator[None]:
        """Make the calls in the block go to a frame of the page."""
        self._call("POST", "/frame", {"id": {ELEMENT: self._find(frame, 0)}})
        try:
            yield
        finally:
            self._call("POST", "/frame", {"id": None})

    def click(self, selector: str, at: int = 0) -> None:
        """Click in the middle of an element, in view, as a person does."""
        element = self._find(selector, at)
        self.run("arguments[0].scrollIntoView({block: 'center'})", {ELEMENT: element})
        self._call("POST", f"/element/{element}/click", {})

    def press(self, *keys: str) -> None:
        """Press keys, by name or as they are, wherever the focus is."""
        actions = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def hover(self, selector: str, at: int = 0) -> None:
        origin = {ELEMENT: self._find(selector, at)}
        move = {"type": "pointerMove", "duration": 0, "origin": origin, "x": 0, "y": 0}
        self._call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def tools(self, command: str, **arguments: Any) -> Any:
        """Run a command of the DevTools protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": arguments})

    def resize(self, width: int, height: int = 800) -> None:
        self.tools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, **features: str) -> None:
        """Set what the media queries of the page find, such as `color_scheme="dark"`."""
        named = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
        self.tools("Emulation.setEmulatedMedia", features=named)

    def complaints(self) -> list[str]:
        """Return what the console was told since the last call: errors, warnings, breaches of the policy."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def _find(self, selector: str, at: int) -> str:
        found = self._call("POST", "/elements", {"using": "css selector", "value": selector})
        return str(found[at][ELEMENT])

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, self._session + path, text, {"Content-Type": "application/json"})
            value = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        if isinstance(value, dict) and "error" in value:
            raise RuntimeError(f"{method} {path}: {value['error']}: {value['message']}")
        return value


@contextmanager
def browser() -> Iterator[Browser]:
    """Give a browser with a profile of its own, and end it and its driver afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, driver() as port:
        found = Browser(port, profile)
        try:
            yield found
        finally:
            found.close()


@contextmanager
def driver() -> Iterator[int]:
    """Give the port of a chromedriver that chose it itself."""
    assert DRIVER is not None
    command = [DRIVER, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            started = next(line for line in process.stdout if "successfully on port " in line)
            yield int(started.rstrip(".\n").split()[-1])
        finally:
            process.terminate()


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Ask again and again until `holds` does."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"this did not come true: {what}"
