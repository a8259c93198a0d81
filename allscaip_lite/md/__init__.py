"""Molecular dynamics with a model, and what is computed from it."""

from allscaip_lite.md.dynamics import Explosion, Settings, read_log, run_md

__all__ = ["Explosion", "Settings", "read_log", "run_md"]
