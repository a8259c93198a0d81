"""Models in files: our own format, fairchem's checkpoints, and the model hub."""

from allscaip_lite.checkpoints.native import bundled_models, load_model, read_card, save_model
from allscaip_lite.checkpoints.official import save_official

__all__ = ["bundled_models", "load_model", "read_card", "save_model", "save_official"]
