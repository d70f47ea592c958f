"""The fast path: blocks of nodes, gradients arranged by hand; for which norms, `latentgnn.paths` says."""
