"""Runs the twelve snippets that a model should not be given the chance to write, and prints what came of them.

    HF_TOKEN=SECRET python hostile.py ISOLATION TIMEOUT ['NAME ...'] -> a line of JSON per snippet

A program of its own, so that the process that must survive has the secret in its environment from the start.
"""

import json
import os
import sys
import time

from fastppo.environments.python import PythonRunner

SNIPPETS = {
    "bombs with forks": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "allocates 10 GB": "print(len(bytearray(10**10)))",
    "loops": "while True:\n    pass",
    "reads its environment": "import os\nprint(dict(os.environ), open('/proc/self/environ').read())",
    "kills its parents": """
import os, signal
for process in (os.getppid(), max(2, os.getppid() - 1), 1):
    try:
        os.kill(process, signal.SIGKILL)
    except (PermissionError, ProcessLookupError):
        pass
""",
    "reads the environment of others": """
import glob
for path in glob.glob("/proc/[0-9]*/environ"):
    try:
        text = open(path).read()
        if "HF_TOKEN" in text:
            print(path, text)
    except OSError:
        pass
print("done")
""",
    "prints without end": "while True:\n    print('x' * 1000)",
    "fills the disk": """
for i in range(10**6):
    with open(f"file{i}", "wb") as file:
        for _ in range(7):
            file.write(b"x" * 2**17)
""",
    "leaves a daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
time.sleep(0.1)
print("left")
""",
    "ignores signals": """
import signal, time
for number in range(1, 32):
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_IGN)
time.sleep(60)
""",
    "closes its output": "import os, time\nos.closerange(0, 3)\ntime.sleep(60)",
    "sleeps in another session": "import os, time\nif os.fork() == 0:\n    os.setsid()\ntime.sleep(60)",
}


def survivors() -> int:
    """Count the interpreters that the runner has started, or that these have."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                arguments = file.read().split(b"\0")
        except OSError:
            continue
        count += arguments[1:-1] == [b"-I", b"-S", b"-B", b"-X", b"utf8", b"main.py"]
    return count


def main(isolation: str, timeout: str) -> None:
    runner = PythonRunner(float(timeout), isolation=isolation)
    for name, code in SNIPPETS.items():
        start = time.monotonic()
        try:
            told = runner(code)
        except (RuntimeError, TimeoutError) as error:
            told = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - start
        print(json.dumps({"name": name, "told": told[:2000], "seconds": seconds, "left": survivors()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
