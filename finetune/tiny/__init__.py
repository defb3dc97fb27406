"""The embedded base model `tiny`: a generated bilingual world, its data, and the model trained on it."""
