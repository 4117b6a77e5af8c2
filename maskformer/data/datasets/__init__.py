"""One module per family of data sets; `maskformer.data.catalog` finds them by name."""
