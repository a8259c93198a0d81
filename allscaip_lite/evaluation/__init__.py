"""How large a model's errors are: on data sets, in physical tasks, on OMol25's leaderboard."""

from allscaip_lite.evaluation.errors import evaluate, residuals, summary

__all__ = ["evaluate", "residuals", "summary"]
