"""Makes the objects of a run from its config, and compares a config with that of a checkpoint."""
