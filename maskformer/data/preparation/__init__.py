"""From data sets as they are downloaded to what `maskformer.data.datasets` reads; the scripts are in ``datasets/``."""
