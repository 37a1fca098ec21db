"""Linear layer and softmax in one, for huge vocabularies (MATH 12)."""
