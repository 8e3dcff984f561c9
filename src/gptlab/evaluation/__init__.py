"""A model's quality in numbers, each with the protocol that it was obtained by."""
