"""Training from scratch: recipes, batches, and a plain single-process loop."""
