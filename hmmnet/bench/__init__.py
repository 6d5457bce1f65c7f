"""Benchmarks: figures beside references measured in the same run. Separate from the tests, which assert no time."""
