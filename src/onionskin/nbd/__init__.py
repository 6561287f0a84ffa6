"""Volumes that machines use while everything else goes on: serving them over NBD.

`server` listens, hands each client to the C server (`onionskin.nbd._nbd`), which speaks the protocol, and ends all in order.
`exports` is what is served: it owns the volumes and opens snapshots when clients ask for them. Under it are `export_table`,
which exports there are by which labels, `changed_blocks`, the metadata contexts, and `exported`, what an export stands for.
`listener`, `systemd`, `tls` and `tls_carrier` are how clients get in, `prometheus` writes what is counted, and `fuse_mount`
shows a snapshot as a file. Other processes work on a served volume through `onionskin.control`.
"""
