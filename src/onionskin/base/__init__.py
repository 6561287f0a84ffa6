"""The lowest package: the standard library and NumPy as the engine needs them. It knows no stores."""
