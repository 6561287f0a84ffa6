"""Volumes that machines use while everything else goes on: serving them over NBD.

`server` owns the volumes and the listening sockets; the protocol itself is C (`onionskin.nbd._nbd`). `systemd` and `tls`
are how clients get in, `prometheus` writes what is counted, and `fuse_mount` shows a snapshot as a file. Other processes
work on a served volume through `onionskin.control`.
"""
