"""Reward models and judges: toxicity of text (Detoxify), alignment of picture and text (open_clip)."""
