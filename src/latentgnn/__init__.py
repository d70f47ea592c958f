"""Global context at linear cost: the LatentGNN layer (ICML 2019, arXiv 1905.11634) and what surrounds it."""
