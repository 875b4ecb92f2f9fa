"""The objects of this process, and when Python's garbage collector walks over them."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

_YOUNG_OBJECTS = 50_000  # before the collector looks for cycles among them; Python's own is 700


@contextlib.contextmanager
def loading_libraries() -> Iterator[None]:
    """While it lasts nothing is collected; if it loaded a module, what is there then never will be.

    What a library defines is no garbage, but every few modules the collector walks over all that
    were loaded before (a sixth of the time that the libraries take), and again whenever accelerate
    asks for a collection (half a second at the start of each training).
    """
    was_on, num_modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > num_modules:
            gc.freeze()
        if was_on:
            gc.enable()


@contextlib.contextmanager
def heap_at_rest() -> Iterator[None]:
    """Spares what is loaded already the garbage collector's walks, here and in copies.

    Rows are a hundred thousand young objects, and every few of them the collector would walk all
    of the libraries, which in a copy also copies their memory: half of the time of a preparation.
    What the caller has frozen stays so.
    """
    thresholds, frozen = gc.get_threshold(), gc.get_freeze_count()
    if not frozen:
        gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if not frozen:
            gc.unfreeze()
