"""Attacks on the model under test. They use an engine's gradients; no Ray."""
