"""The NBD server: it serves volumes and snapshots to other machines and programs.

`server` listens, hands each client to the C server (`onionskin.nbd._nbd`), and ends everything in order. The C server
speaks the protocol. `exports` owns the served volumes and opens snapshots when clients ask for them. It uses
`export_table` (the exports by their labels), `changed_blocks` (the metadata contexts) and `exported` (the volume or
view behind an export). `listener`, `systemd`, `tls` and `tls_carrier` let clients in. `prometheus` writes the counters,
and `fuse_mount` shows a snapshot as a file. `for_program` serves a disk to one program that this process starts. Other
processes work on a served volume through `onionskin.control`.
"""
