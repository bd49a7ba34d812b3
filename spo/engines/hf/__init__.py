"""The exact, differentiable engine on Transformers."""
