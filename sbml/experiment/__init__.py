"""From a config to the objects of a run, and what a checkpoint says of its origin."""
