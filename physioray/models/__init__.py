"""Tokenizers, transformers and heads: they know tensors and nothing else."""
