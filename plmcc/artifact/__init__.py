"""Artifacts: the directory that `AutoModel` loads, its lock, its size, and its verification.

Empty on purpose: `plmcc` imports `artifact.format` while transformers is being imported.
"""
