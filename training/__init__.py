"""Programs that use the library: training, evaluation, benchmarks. Run from a checkout with `python -m training.NAME`."""
