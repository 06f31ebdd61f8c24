"""Optional imports, progress, terminal, files. Knows nothing of models."""
