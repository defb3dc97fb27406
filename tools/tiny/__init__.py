"""The bundled base model `tiny`: generated bilingual text, datasets, and the training of the model."""
