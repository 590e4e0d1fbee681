"""The garbage collector is paused while plans are made, and no longer."""

from __future__ import annotations

import gc

import pytest

from milepost.collective.collector import collection_paused


def test_it_continues_after_the_block_and_after_an_error():
    with collection_paused():
        assert not gc.isenabled()
        with collection_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="inside"), collection_paused():
        raise ValueError("inside")
    assert gc.isenabled()


def test_a_pause_of_the_program_is_kept():
    gc.disable()
    try:
        with collection_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
