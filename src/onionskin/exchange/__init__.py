"""Image files, streams and devices that other programs write and read. No module here knows a store."""
