"""Training a model on labelled structures."""

from allscaip_lite.training.loop import Stage, conservative_stage, direct_stage, train

__all__ = ["Stage", "conservative_stage", "direct_stage", "train"]
