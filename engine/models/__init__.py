"""Identity and properties of a model folder."""
