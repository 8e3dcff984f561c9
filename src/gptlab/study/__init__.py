"""The comparison: variants of one model under the same conditions, measured, and written up."""
