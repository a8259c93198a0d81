"""How large a model's errors are: on data sets, in physical tasks, on OMol25's leaderboard."""
