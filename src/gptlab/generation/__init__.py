"""From a model and a tokenizer to text."""
