"""The strongest plain PyTorch that we could write for each op, at most 40 lines each, a module a family.

The first ratio of a kernel is over the best of these."""
