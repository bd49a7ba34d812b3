"""The distributed stages: one file for each Ray library. They do not import each other."""
