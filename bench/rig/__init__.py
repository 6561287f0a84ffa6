"""What the suite and ``figures.py`` stand on: interleaved timing, disks with known bytes, the peers."""
