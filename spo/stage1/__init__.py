"""Stage I: contrasts, their activations, and the first vector."""
