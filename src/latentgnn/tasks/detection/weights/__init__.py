"""Trained weights: their sources, the meaning of their names, and which of them a detector loads."""
