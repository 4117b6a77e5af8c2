#!/usr/bin/env python
"""Score predictions: ``python tools/evaluate_predictions.py --task panoptic_seg --predictions F --dataset NAME``."""

import sys

from maskformer.score import main

if __name__ == "__main__":
    sys.exit(main())
