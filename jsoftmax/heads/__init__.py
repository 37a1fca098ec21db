"""Linear heads for huge vocabularies."""
