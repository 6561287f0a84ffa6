"""Pictures of the places of data: the map of a disk by layers, and the tree of a store, for terminals and as files.

`cells` and `bands` decide what is shown. `maps`, `terminal` and `trees` draw it. `svg` and `png` write files.
"""
