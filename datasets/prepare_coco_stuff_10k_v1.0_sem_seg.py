#!/usr/bin/env python
"""COCO-Stuff-10k: ``python datasets/prepare_coco_stuff_10k_v1.0_sem_seg.py`` (``--help`` tells the arguments)."""

import sys

from maskformer.data.preparation.coco_stuff import main

if __name__ == "__main__":
    sys.exit(main())
