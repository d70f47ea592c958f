"""The fast path: blocks of nodes and a hand-written backward pass; `latentgnn.paths` says for which norms."""
