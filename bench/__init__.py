"""Benchmarks: ``families`` the cases, ``suite`` all of them, ``measure`` how, ``run`` and ``report`` the output."""
