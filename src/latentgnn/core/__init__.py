"""The layer for norms that are affine maps or batch norm in training: blocks of nodes, gradients by hand."""
