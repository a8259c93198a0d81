"""Faster forms of the operations of the model, with the same names and the same results."""
