"""The report's calculator, with the figures of this machine."""
