"""Benchmarks: ``suite`` the cases, ``arms`` what runs in each, ``measure`` how, ``run`` and ``report`` the output."""
