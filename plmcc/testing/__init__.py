"""The contract of passes and models, the dry run, tiny models, reduced random copies."""
