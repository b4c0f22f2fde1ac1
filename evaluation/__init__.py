"""Scores beside FID: CLIP score, and the captions and images of COCO as published numbers take them."""
