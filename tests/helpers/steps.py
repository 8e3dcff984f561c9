# The compiled step, for tests that run with it and without.
import pytest

from gptlab.generation.compiled.library import NoLibraryError, library

try:
    library()
    BUILT = True
except NoLibraryError:
    BUILT = False

needs_step = pytest.mark.skipif(not BUILT, reason="no C++ compiler")
HOW = pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_step), False], ids=["compiled", "plain"])
