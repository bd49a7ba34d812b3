"""Pure rules on tensors and records: no Ray, no vLLM, no Transformers. Testable on any CPU."""
