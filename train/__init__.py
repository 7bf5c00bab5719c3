"""Training programs that run from a checkout: one file an experiment, all on the one loop in `train.loop`."""
