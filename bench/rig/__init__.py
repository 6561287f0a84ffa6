"""What the suite and ``targets`` stand on: interleaved timing, disks with known bytes, the peers."""
