"""How large a model's errors are on data sets."""

from allscaip_lite.evaluation.errors import evaluate, residuals, summary

__all__ = ["evaluate", "residuals", "summary"]
