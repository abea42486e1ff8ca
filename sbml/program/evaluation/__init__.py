"""What the modes of a trained model share: cells of the table of likelihoods, and samples."""
