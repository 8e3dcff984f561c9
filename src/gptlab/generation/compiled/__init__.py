"""Decoding by C++ that is compiled for the processor at hand."""
