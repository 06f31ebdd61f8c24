"""torch.compile, compiled beam search and CUDA graphs."""
