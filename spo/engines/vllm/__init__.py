"""The fast engine on vLLM, from the caller's side; the worker's side is in `plugin`."""
