"""The names of a transformers class's tensors in its files, from transformers in a separate process. Torch-free.

A module may have other names than its files (transformers 5: the experts of a layer as one tensor, text models inside
others), and only its class knows both. If transformers is not installed, or lacks the class, they are unknown.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import msgspec

from milepost.interop.hf.kept import KeptNames

log = logging.getLogger("milepost")

TIMEOUT_S = 300.0
"""Importing transformers takes seconds, and a minute on a busy machine."""
_PROGRAM = "import sys; sys.path[:0] = sys.argv[2:]; from milepost.interop.hf.hub_names import main; main(sys.argv[1])"


def names_of_class(name: str, config: Mapping[str, Any]) -> KeptNames | None:
    """The names of the transformers class ``name`` with the sizes of a ``config.json``; None if unknown.

    The module is built without memory for its tensors, and only from transformers' own code.
    """
    command = [sys.executable, "-P", "-c", _PROGRAM, name, *sys.path]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(
            command, input=json.dumps(config).encode(), env=environment, capture_output=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        log.warning("transformers did not report the names of %s within %.0f s", name, TIMEOUT_S)
        return None
    try:
        return msgspec.json.decode(done.stdout.rpartition(b"\n")[2], type=KeptNames)
    except msgspec.DecodeError:
        log.debug("transformers does not report the names of %s: %s", name, done.stderr.decode(errors="replace")[-500:])
        return None
