"""The recipes that made the weights in `spo/testbed/weights`, to be run on one GPU."""
