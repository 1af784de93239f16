"""The ``torch`` backend: each op in plain PyTorch, chunked; it runs wherever torch runs."""
