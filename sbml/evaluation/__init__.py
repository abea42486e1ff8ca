"""Evaluation of a trained model: likelihood table, baselines, samples and their quality."""
