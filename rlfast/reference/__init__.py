"""The oracle: what each op must compute, in plain PyTorch, by autograd alone. It imports nothing of rlfast."""
