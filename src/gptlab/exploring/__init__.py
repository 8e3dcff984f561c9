"""A page for looking inside models, on this machine. Needs the extra ``serve``."""
