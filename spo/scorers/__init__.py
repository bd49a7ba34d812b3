"""Toxicity of text (Detoxify) and alignment of picture and text (open_clip): rewards, judges."""
