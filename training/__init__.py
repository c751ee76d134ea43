"""Programs that use the library: train, evaluate, benchmark. Run from a checkout with `python -m training.NAME`."""
