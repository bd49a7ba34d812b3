"""What a run is made on: training prompts and evaluation sets."""
