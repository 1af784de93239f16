"""The ``cpu`` and ``cuda`` backends: tensors to raw pointers, one file an op; the kernels are in ``csrc/``."""
