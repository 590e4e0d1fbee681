"""One rank of a training job: ``torchrun --nproc_per_node 2 -m milepost.train --job.config_file configs/...``.

The configuration is read before torch is imported, so that a mistake in it is reported at once.
"""

from __future__ import annotations

import os
import sys

from milepost.errors import MilepostError
from milepost.train.options import load_config
from milepost.train.process import (
    hold_save_requests,
    leave,
    leave_on_signals,
    leave_with,
    leave_with_launcher,
    show_log,
)


def main() -> None:
    leave_on_signals()
    hold_save_requests()
    leave_with_launcher()
    show_log()
    try:
        config = load_config(sys.argv[1:], int(os.environ.get("WORLD_SIZE", "1")))
    except MilepostError as error:
        leave_with(error)
    try:
        from milepost.train.loop import train

        status = train(config)
    except Exception as error:  # noqa: BLE001 - the top of a process: every error is reported and ends it
        leave_with(error)
    leave(status)


if __name__ == "__main__":
    main()
