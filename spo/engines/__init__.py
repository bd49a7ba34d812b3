"""Model runtimes behind one protocol: `hf` (exact, differentiable), `vllm`, `fake`. No Ray."""
