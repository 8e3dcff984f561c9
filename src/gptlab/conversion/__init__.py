"""A trained model of one architecture made into a model of another, with as much of what it knows as possible."""
