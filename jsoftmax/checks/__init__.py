"""What public functions ask of their arguments: scores and numbers, labels, matrices, keys and samples."""
