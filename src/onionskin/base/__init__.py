"""What every room stands on: the standard library and NumPy, seen as the engine needs them. No stores here."""
