"""The embedded default: drawn scenes, small trained models, and how they were trained."""
