"""Trained weights: where they come from, what their names mean, and what of them a detector takes over."""
