"""Model runtimes behind one protocol: `hf` (exact, differentiable), `vllm` (fast), `fake`. No Ray."""
