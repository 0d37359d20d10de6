"""The tools that ship: what they compute, and what they survive."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import pytest

from fastppo.environments.pool import ToolPool
from fastppo.environments.python import PythonRunner
from fastppo.environments.tools import Calculator

ROOT = Path(__file__).parents[1]
TIMEOUT = 0.4


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("13.2-5", "8.2"),
        (" 2 + 3 * 4 ", "14"),
        ("-(7 // 2) ** 2", "-9"),
        ("7 % 4 / 2", "1.5"),
        ("6 / 3", "2"),
        ("10 ** 20", "100000000000000000000"),
        ("2 ** -1", "0.5"),
        ("round(sqrt(2), 3) + max(1, 2, abs(-3))", "4.414"),
        ("1 / 3", "0.333333333333"),
        ("round(1250, -2)", "1200"),
    ],
)
def test_the_calculator_calculates(expression, result):
    assert Calculator()(expression) == result


@pytest.mark.parametrize(
    ("expression", "error", "message"),
    [
        ("1 / 0", ZeroDivisionError, "division by zero"),
        ("9 ** 9 ** 9", OverflowError, "the power has more than 4096 bits"),
        ("(2 ** 4000) * (2 ** 4000)", OverflowError, "the result is too large"),
        ("1e308 * 10", OverflowError, "the result is too large"),
        ("(-8) ** 0.5", ValueError, "is not a real number"),
        ("__import__('os').system('true')", ValueError, "is not a real number"),
        ("exit()", ValueError, "exit is not one of the functions abs"),
        ("2 +", ValueError, "is not an arithmetic expression"),
        ("('a' * 9)", ValueError, "is not a real number"),
        ("True + 1", ValueError, "is not a real number"),
        ("x", ValueError, "is not a real number"),
        ("(" * 400, ValueError, "is not an arithmetic expression"),
        ("1" * 501, ValueError, "has 501 characters"),
        ("[1][0]", ValueError, "is not a real number"),
    ],
)
def test_the_calculator_refuses(expression, error, message):
    with pytest.raises(error, match=message):
        Calculator()(expression)


def test_rounding_to_endless_digits_holds_up_nobody():
    start = time.monotonic()
    assert Calculator()("round(7 ** 1000, -20000000)") == "0"  # Python would compute 10 ** 20000000 first
    assert Calculator()("round(7.25, -20000000) + round(7.25, 20000000)") == "7.25"
    assert time.monotonic() - start < 1


# --- the runner -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runner():
    return PythonRunner(5.0, memory=128 * 2**20, max_output=1000)


def test_the_runner_returns_what_is_printed(runner):
    code = "import json, sys\nprint(json.dumps({'é': 6 * 7}, ensure_ascii=False))\nprint('and', file=sys.stderr)"
    assert sorted(runner(code).splitlines()) == ["and", '{"é": 42}']
    assert runner("") == ""


def test_failures_and_limits_are_errors(runner):
    with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero"):
        runner("1 / 0")
    with pytest.raises(RuntimeError, match="exit code 3"):
        runner("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="MemoryError"):
        runner("bytearray(10**9)")
    with pytest.raises(RuntimeError, match="File too large"):
        runner("open('a', 'wb').write(bytes(2**21))")
    with pytest.raises(RuntimeError, match="Too many open files"):
        runner("kept = [open('main.py') for _ in range(100)]")
    assert runner("print('x' * 5000)") == "x" * 1000


def test_each_run_is_alone(runner):
    assert runner("open('left', 'w').write('here')") == ""
    assert (
        runner("import os\nprint(sorted(os.listdir()), {**os.environ}.keys() - {'LC_CTYPE'})") == "['main.py'] set()\n"
    )


def test_runs_side_by_side_do_not_mix(runner):
    code = "import os, time\nopen('mine', 'w').write('{0}')\ntime.sleep(0.1)\nprint(open('mine').read(), os.getuid())"
    with ThreadPoolExecutor(6) as threads:
        told = list(threads.map(runner, [code.format(i) for i in range(6)]))
    assert [one.split()[0] for one in told] == list("012345")
    if os.geteuid() == 0:  # each is a user of its own, for limits of its own
        assert len({one.split()[1] for one in told}) == 6
        one_after_the_other = {runner("import os\nprint(os.getuid())") for _ in range(2)}
        assert len(one_after_the_other) == 2  # what marks a run is not used again when another may have just begun


def test_namespaces_hide_the_machine(runner):
    if runner.isolation != "namespaces":
        pytest.skip(f"this system gives {runner.isolation!r}")
    code = f"""
import os, socket
print(os.path.exists({str(ROOT)!r}), os.path.exists('/proc/1'), os.path.exists('/etc/passwd'))
for path in ('/usr/x', '/x', '/tmp/x'):
    try:
        open(path, 'w')
        print('wrote', path)
    except OSError as error:
        print(error.strerror)
try:
    socket.create_connection(('127.0.0.1', 22), timeout=1)
except OSError as error:
    print(error.strerror)
"""
    nowhere = "Read-only file system\n" * 2
    assert runner(code) == f"False False False\n{nowhere}wrote /tmp/x\nNetwork is unreachable\n"


def test_the_runner_says_what_it_cannot_do(monkeypatch):
    with pytest.raises(ValueError, match="timeout must be greater than 0"):
        PythonRunner(0)
    with pytest.raises(ValueError, match="isolation must be one of"):
        PythonRunner(isolation="jail")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(RuntimeError, match="PythonRunner cannot run code here"):
        PythonRunner()


def check_hostile(python, isolation, user=None):
    """Run the snippets in a program of its own; nobody may be harmed."""
    command = [python, "-c", "import sys; exec(sys.stdin.read())", isolation, str(TIMEOUT)]
    source = (ROOT / "tests" / "hostile.py").read_text()
    environment = {"PYTHONPATH": str(ROOT), "HF_TOKEN": "hf_a_secret", "PATH": os.environ["PATH"]}
    options = {"input": source, "text": True, "capture_output": True, "timeout": 60, "cwd": "/"}
    done = subprocess.run(command, env=environment, user=user, **options)
    assert done.returncode == 0, done.stderr  # it is alive at the end
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["name"] for line in lines] == list(hostile.SNIPPETS)
    for line in lines:
        assert "hf_a_secret" not in line["told"], line
        assert line["seconds"] <= TIMEOUT + 1, line
        assert line["left"] == 0, line
    told = {line["name"]: line["told"] for line in lines}
    assert "MemoryError" in told["allocates 10 GB"]
    for name in ("bombs with forks", "loops", "ignores signals", "closes its output", "sleeps in another session"):
        assert told[name] == f"TimeoutError: no end within {TIMEOUT:g} seconds"
    assert told["prints without end"].startswith("xxxx")
    assert told["leaves a daemon"] == "left\n"


def test_twelve_hostile_snippets(runner):
    if runner.isolation == "none":
        pytest.skip("nothing separates code from its user here")
    check_hostile(sys.executable, runner.isolation)


@pytest.mark.slow
@pytest.mark.parametrize(("isolation", "user"), [("user", None), ("namespaces", 12345)])
def test_hostile_snippets_where_less_is_allowed(isolation, user):
    python = shutil.which("python3", path="/usr/bin")
    if os.geteuid() != 0 or python is None:
        pytest.skip("needs root and a Python that every user may read")
    check_hostile(python, isolation, user)


# --- the pool -------------------------------------------------------------------------------------------------------


def test_the_pool_runs_some_at_a_time_and_gives_up_on_the_slow():
    release, running, most = threading.Event(), [], []

    def tool(query):
        running.append(query)
        most.append(len(running))
        if query == "hangs":
            release.wait(20)
        running.remove(query)
        return query

    pool = ToolPool(2, 0.3)
    tickets = {pool.submit(tool, query): query for query in ("hangs", "a", "b", "c")}
    outcomes = {}
    while len(outcomes) < 4:
        outcomes |= {tickets[ticket]: outcome for ticket, outcome in pool.collect(block=True)}
    assert max(most) <= 2
    assert [outcomes[query].value for query in "abc"] == ["a", "b", "c"]
    assert isinstance(outcomes["hangs"].error, TimeoutError)
    assert 0.3 <= outcomes["hangs"].seconds < 2
    assert pool.collect(block=True) == []  # nothing is under way: it does not wait
    release.set()
    assert pool.collect(block=False) == []  # what comes too late is dropped
