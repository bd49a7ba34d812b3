"""Sweeps: Ray Tune over one shared engine pool.

In: a sweep file (a space over a run configuration), training prompts. Out: a folder with Optuna's
database, a result for each trial, TensorBoard files, `sweep.csv` and `report.html`.
"""
