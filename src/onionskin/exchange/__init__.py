"""Formats of images and streams that others write and read. No stores here."""
