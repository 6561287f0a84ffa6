"""The files of a store, the locks on them, and the data paths that are open over them."""
