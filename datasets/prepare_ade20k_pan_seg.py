#!/usr/bin/env python
"""Panoptic truth of ADE20K: ``python datasets/prepare_ade20k_pan_seg.py`` (``--help`` tells the arguments)."""

import sys

from maskformer.data.preparation.ade20k_panoptic import main

if __name__ == "__main__":
    sys.exit(main())
