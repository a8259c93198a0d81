"""Molecular dynamics with a model, and what is computed from it."""
