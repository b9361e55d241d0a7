"""Share one video among ranks; the only package that uses torch.distributed."""
