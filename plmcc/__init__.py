"""plmcc: a declarative model-compression compiler for pretrained language models."""
