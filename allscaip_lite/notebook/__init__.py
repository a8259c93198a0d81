"""For notebooks: attention maps, plots, the attention explorer, and what the lessons share."""
