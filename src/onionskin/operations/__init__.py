"""One module for each operation on a store or a volume; `Store` and `Volume` only call them."""
