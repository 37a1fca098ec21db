"""Checks of the arguments of public functions: scores and numbers, labels, matrices, keys and samples."""
