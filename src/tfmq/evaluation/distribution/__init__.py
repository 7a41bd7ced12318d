"""How near a set of images is to another: features of images, and metrics of two sets of features by
well-kept libraries.
"""
