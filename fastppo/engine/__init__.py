"""Generation on the very weights that are trained."""
