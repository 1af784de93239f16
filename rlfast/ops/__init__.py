"""One ``torch.library`` op a file: schema, backend choice, fake kernel, autograd. Arguments arrive validated."""
