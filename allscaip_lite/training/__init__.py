"""Training a model on labelled structures."""
