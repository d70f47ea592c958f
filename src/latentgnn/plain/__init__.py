"""The plain path: the equations as PyTorch operations, for inputs and layers that do not take the core."""
