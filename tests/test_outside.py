"""Laws of a peer in a process of its own: answers come as they are, a failure has its reason, nothing is left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from lookahead.bench import outside
from lookahead.bench.outside import Answer, Outside, PeerFailed
from lookahead.bench.peak import Peak, family

BENCH = Path(outside.__file__).parent
READY = 'say({"ready": True, "about": {"fake": "1.0"}, "settings": {"window": 7}})\n'
ECHO = """
for line in sys.stdin:
    request = json.loads(line)
    say({"tokens": request["ids"][: request["new"]], "seconds": 0.5, "passes": 2, "peak_mb": None, "error": None})
"""
HANG = "time.sleep(600)\n"


def peer(folder: Path, body: str, *, start_s: float = 60.0, answer_s: float = 60.0) -> Outside:
    """Return a peer whose script says and does what `body` does."""
    script = folder / "fake.py"
    head = "import json, os, subprocess, sys, time\ndef say(message):\n    print(json.dumps(message), flush=True)\n"
    script.write_text(head + body)
    return Outside(sys.executable, script, {"greeting": "hello"}, start_s=start_s, answer_s=answer_s)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_answers_come_as_they_are(tmp_path: Path) -> None:
    with peer(tmp_path, READY + ECHO) as one:
        assert (one.about, one.settings) == ({"fake": "1.0"}, {"window": 7})
        assert one.run([5, 6, 7], 2) == Answer([5, 6], 0.5, 2, None)
        assert one.run([8], 4, schema={"type": "null"}) == Answer([8], 0.5, 2, None)


def test_settings_and_requests_reach_the_peer(tmp_path: Path) -> None:
    told = 'say({"ready": True, "about": {}, "settings": json.loads(sys.argv[1])})\n'
    with peer(tmp_path, told + 'say({"error": sys.stdin.readline()})\n') as one:
        assert one.settings == {"greeting": "hello"}
        with pytest.raises(PeerFailed, match=r'fake\.py: .*"ids": \[1\], "new": 3, "ignore_eos": true, "schema": {}'):
            one.run([1], 3, ignore_eos=True, schema={})


FAILURES = {
    "an error": ('say({"error": "no such model"})\n', "fake.py: no such model"),
    "no end": ('print("torn", file=sys.stderr)\nsys.exit(3)\n', "fake.py: it has ended\n    torn"),
    "garbage": ('print("loading …", flush=True)\n' + HANG, "not an answer: 'loading"),
    "another shape": ("say([1])\n", "not an answer"),
    "not ready": ('say({"ready": False})\n', "not ready"),
    "nothing about it": ('say({"ready": True})\n', "not ready: {'ready': True}"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_peer_that_does_not_start_says_why(tmp_path: Path, name: str) -> None:
    body, reason = FAILURES[name]
    with pytest.raises(PeerFailed) as caught, peer(tmp_path, body):
        pass
    assert reason in str(caught.value)


ANSWERS = {
    "an error": ('say({"error": "too long"})\n', "fake.py: too long"),
    "dies": ("sys.exit(1)\n", "it has ended"),
    "is killed": ("os.kill(os.getpid(), 9)\n", "it has ended"),
    "garbage": ('print("hm", flush=True)\n', "not an answer: 'hm'"),
    "half an answer": ('say({"tokens": [1]})\n', "an answer without 'seconds'"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_peer_that_fails_in_the_middle_says_why(tmp_path: Path, name: str) -> None:
    body, reason = ANSWERS[name]
    first = ECHO.replace("for line in sys.stdin:", "for line in [sys.stdin.readline()]:")
    with peer(tmp_path, READY + first + "sys.stdin.readline()\n" + body) as one:
        one.run([1], 1)
        with pytest.raises(PeerFailed) as caught:
            one.run([1], 1)
    assert reason in str(caught.value)


def test_a_peer_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match=r"fake\.py: no answer in 0\.05 s"), peer(tmp_path, HANG, start_s=0.05):
        pass
    with peer(tmp_path, READY + HANG, answer_s=0.05) as one:
        begin = time.monotonic()
        for _ in range(2):  # an answer that comes late is never taken for that to a later question
            with pytest.raises(PeerFailed, match=r"no answer in 0\.05 s"):
                one.run([1], 1)
        assert time.monotonic() - begin < 10
        assert not alive(one._process.pid)


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match=r"No such file or directory; see benchmarks/peers\.sh"):
        Outside(tmp_path / "bin" / "python", "fake.py", {}).__enter__()


def test_many_lines_on_standard_error_block_nothing_and_the_last_are_told(tmp_path: Path) -> None:
    chatter = 'for number in range(50_000):\n    print("line", number, file=sys.stderr)\n'
    with peer(
        tmp_path, chatter + READY + ECHO.replace("    request", f"    {chatter.splitlines()[0]} pass\n    request")
    ) as one:
        assert one.run([1], 1).tokens == [1]
    with pytest.raises(PeerFailed) as caught, peer(tmp_path, chatter + 'say({"error": "enough"})\n'):
        pass
    lines = str(caught.value).splitlines()
    assert lines[0] == "fake.py: enough"
    assert lines[1:] == [f"    line {number}" for number in range(49_985, 50_000)]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("way", ["ends", "fails", "raises"])
def test_children_of_a_peer_end_with_it(tmp_path: Path, way: str) -> None:
    child = 'child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])\n'
    told = 'say({"ready": True, "about": {}, "settings": {"child": child.pid}})\n'
    one = peer(tmp_path, child + told + (HANG if way != "ends" else ECHO), answer_s=0.05)
    with suppress(PeerFailed, KeyError), one:
        if way == "raises":
            raise KeyError
        one.run([1], 1)
    deadline = time.monotonic() + 10
    while alive(one.settings["child"]) and time.monotonic() < deadline:
        os.sched_yield()
    assert not alive(one.settings["child"])
    assert one._process.returncode in (-signal.SIGKILL, 0)


# -- the other end ----------------------------------------------------------------------------------------------------

SERVED = """
import json, os, subprocess, sys
from serving import Reply, serve

class Echo:
    packages = ("pytest",)
    settings = {"loud": True}
    def generate(self, ids, new, *, ignore_eos, schema):
        print("all that is printed")
        subprocess.run(["echo", "by children too"])
        if schema is not None:
            raise ValueError("no schemas")
        return Reply(ids[:new], 0.25, None)
    def close(self):
        print("closed", file=sys.stderr)

def start(settings):
    print("loading")
    if settings.get("greeting") != "hello":
        raise ValueError("rude")
    return Echo()

sys.exit(serve(start, sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A peer made with `serving`, found as scripts of that folder find it."""
    path = tmp_path / "echo.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(BENCH)!r})\n" + SERVED)
    return path


def test_what_a_peer_prints_does_not_reach_the_answers(script: Path) -> None:
    with Outside(sys.executable, script, {"greeting": "hello"}) as one:
        assert one.settings == {"loud": True}
        assert one.about.keys() == {"pytest"}
        answer = one.run([4, 5, 6], 2)
        assert (answer.tokens, answer.seconds, answer.passes) == ([4, 5], 0.25, None)
        with pytest.raises(
            PeerFailed, match=r"echo\.py: ValueError: no schemas\n(.*\n)*.*all that is printed"
        ) as caught:
            one.run([4], 2, schema={})
        assert "by children too" in str(caught.value)
        assert one.run([7], 2).tokens == [7]


def test_a_peer_that_cannot_be_made_says_why(script: Path) -> None:
    with pytest.raises(PeerFailed, match=r"echo\.py: ValueError: rude"), Outside(sys.executable, script, {}):
        pass


def test_a_peer_ends_with_its_input(script: Path) -> None:
    command = [sys.executable, str(script), '{"greeting": "hello"}']
    run = subprocess.run(command, input="", capture_output=True, text=True, timeout=60)
    assert run.returncode == 0
    assert run.stderr.rstrip().endswith("closed")
    assert len(run.stdout.splitlines()) == 1


# -- memory -----------------------------------------------------------------------------------------------------------


def held(megabytes: int) -> bytearray:
    return bytearray(b"x") * (megabytes * 1_000_000)


def test_peak_is_what_a_call_needs_beside_what_is_held() -> None:
    before = held(60)
    with Peak() as small:
        pass
    with Peak() as large:
        held(80)
    if small.mb is None or large.mb is None:
        pytest.skip("this system does not tell")
    assert small.mb < 10
    assert 75 < large.mb < 100
    assert before


def test_peak_counts_children_that_are_there() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "input()\nb'x' * 80_000_000\nprint(flush=True)\ninput()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.pid in family(os.getpid())
        with Peak() as peak:
            child.stdin.write(b"\n")
            child.stdin.flush()
            child.stdout.readline()
        child.stdin.write(b"\n")
        child.stdin.flush()
    if peak.mb is None:
        pytest.skip("this system does not tell")
    assert 75 < peak.mb < 100


def test_peak_is_none_where_the_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lookahead.bench import peak

    monkeypatch.setattr(peak, "PROC", tmp_path)
    with Peak() as measured:
        pass
    assert measured.mb is None


def test_scripts_do_without_lookahead() -> None:
    """They run where it is not installed: whatever they import of it, they import for type checkers alone."""
    for name in ("peak", "serving"):
        run = subprocess.run(
            [sys.executable, "-c", f"import sys, {name}; print('lookahead' in sys.modules)"],
            cwd=BENCH,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.stdout == "False\n", run.stderr
