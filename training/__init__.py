"""Programs that use the library: train, evaluate, benchmark. Run from a checkout with `python -m training.NAME`."""

import os

# OpenMP's threads spin while they wait for each other. By default they do so for so long that where another process has
# one of the cores, a small net trains ten times slower than on one thread; ten thousand turns cost nothing on free
# ones.
# Read when torch is imported, so it is set before that.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
