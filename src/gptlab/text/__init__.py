"""Texts, and the tokenizers that turn them into ids."""
