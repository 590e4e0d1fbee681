"""What ranks exchange: objects of any size arrive as they were, in few messages, and large arrays without copies."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import torch.distributed as dist

from milepost.collective import comm as comm_module
from milepost.collective.comm import default_comm
from milepost.testing.world import run_world

SIZES = (0, 1, 4095, 4096, 4097, 100_000)


def exchange_objects() -> dict[str, Any]:
    comm = default_comm()
    warnings.simplefilter("error")
    own = {"rank": comm.rank, "text": "x" * 5000 * comm.rank, "none": None}
    found: dict[str, Any] = {"gathered": comm.gather(own)}
    found["bytes"] = [len(comm.broadcast(bytes(size) if comm.rank == 0 else b"")) for size in SIZES]
    with mock.patch.object(comm_module, "WINDOW_NBYTES", 3 << 20):  # a large array goes in pieces
        column = np.frombuffer(np.arange(1 << 20, dtype=np.int64).tobytes(), np.int64)
        value = {
            "large": column,
            "small": np.arange(5),
            "twice": column,
            "every other": column[::2],
            "empty": column[:0],
        }
        got = comm.broadcast(value if comm.rank == 0 else {})
    found["sums"] = {name: (len(array), int(array.sum())) for name, array in got.items()}
    found["is the same"] = got["large"] is got["twice"]
    return found


def test_objects_arrive_as_they_were_whatever_their_size() -> None:
    ranks = run_world(exchange_objects, 3, timeout_s=60)
    assert ranks[0]["gathered"] == [{"rank": r, "text": "x" * 5000 * r, "none": None} for r in range(3)]
    total = (1 << 20) * ((1 << 20) - 1) // 2
    for rank, found in enumerate(ranks):
        assert rank == 0 or found["gathered"] is None
        assert found["bytes"] == list(SIZES)
        assert found["sums"] == {
            "large": (1 << 20, total),
            "small": (5, 10),
            "twice": (1 << 20, total),
            "every other": (1 << 19, (total - (1 << 19)) // 2),
            "empty": (0, 0),
        }
        assert found["is the same"]


def count_collectives() -> dict[str, list[str]]:
    comm = default_comm()
    called: list[str] = []

    def counted(name: str) -> Any:
        real = getattr(dist, name)
        return mock.patch.object(dist, name, lambda *args, **more: (called.append(name), real(*args, **more))[1])

    names = ("all_reduce", "gather", "broadcast", "all_gather", "gather_object", "broadcast_object_list")
    found = {}
    with ExitStack() as patched:
        for name in names:
            patched.enter_context(counted(name))
        for what, act in (
            ("gather", lambda: comm.gather(comm.rank)),
            ("broadcast", lambda: comm.broadcast(comm.rank)),
            ("broadcast 100 KB", lambda: comm.broadcast(b"x" * 100_000)),
        ):
            called.clear()
            act()
            found[what] = list(called)
    return found


def test_an_exchange_takes_no_message_from_every_rank_to_every_other() -> None:
    (found, _) = run_world(count_collectives, 2, timeout_s=60)
    assert found == {
        "gather": ["all_reduce", "gather"],
        "broadcast": ["broadcast"],
        "broadcast 100 KB": ["broadcast", "broadcast"],
    }
