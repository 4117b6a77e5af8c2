#!/usr/bin/env python
"""Write MODEL_ZOO.md; ``--measure`` first measures recipes that docs/measurements.json lacks."""

import sys

from maskformer.model_zoo import main

if __name__ == "__main__":
    sys.exit(main())
