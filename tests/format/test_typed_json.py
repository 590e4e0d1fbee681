"""Typed JSON where threads come first to a kind together."""

from __future__ import annotations

import subprocess
import sys

# In the time that the text of an annotation takes to be evaluated, another thread finds its kind half compiled.
FIRST_USE = """
import threading, time
import msgspec
from milepost.format.typed_json import typed

def slow():
    time.sleep(0.3)
    return int

class Inner(msgspec.Struct):
    number: "slow()"

class Outer(msgspec.Struct):
    text: str
    inner: Inner

found = []
def read():
    found.append(typed({"text": "a", "inner": {"number": 1}}, Outer, "a.json"))

threads = [threading.Thread(target=read) for _ in range(4)]
for thread in threads:
    thread.start()
    time.sleep(0.05)
for thread in threads:
    thread.join()
assert found == [Outer("a", Inner(1))] * 4, found
"""


def test_threads_that_use_a_kind_first_and_together_all_read_it() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr}"
