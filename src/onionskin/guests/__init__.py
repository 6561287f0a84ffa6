"""Guests for machines: a Linux that is put together from packages of Debian, which are there already.

Nothing is downloaded or installed, and no other program is run than mkfs.ext4. What is missing is named in one line.
"""
