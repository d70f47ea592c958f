"""The page of ``latentgnn explore``: what the blocks of a trained model do, node by node, in a browser."""
