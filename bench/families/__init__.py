"""One module a family of ops: all that the benchmarks know of its cases. ``bench/suite.py`` lists them."""
