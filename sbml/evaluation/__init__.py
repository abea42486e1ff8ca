"""Numbers of a trained model: cells of the table, baselines, samples and their quality."""
