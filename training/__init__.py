"""Programs that use the library: train, evaluate, benchmark. Run from a checkout with `python -m training.NAME`."""

import os

# OpenMP's threads spin while they wait for each other, by default for so long that a small net trains ten times slower
# than on one thread where another process has one of the cores. Ten thousand turns cost nothing on free cores. What
# torch loads reads this, so it is set before torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
