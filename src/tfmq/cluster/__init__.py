"""The verbs on many workers: Ray says who does what and does again what a dead worker left; results do not
depend on how many there are.
"""
