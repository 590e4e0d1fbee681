"""The page on the supported state agrees with the tests."""

from __future__ import annotations

import state_page


def test_the_page_is_current() -> None:
    assert state_page.PAGE.read_text() == state_page.text(), "run python tests/fidelity/state_page.py"
