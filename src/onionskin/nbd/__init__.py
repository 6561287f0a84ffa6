"""Volumes that machines use while everything else goes on: serving them, and working on them from other processes.

`serving` owns the volumes and the listening sockets; the protocol itself is C (`onionskin._nbd`). `control` answers on
the control socket of a served volume, and `remote` is the other end of it. `sockets`, `activation` and `tls` are how
clients get in; `mounting` shows a snapshot as a file. Imports go to `store` and `volume`, never back.
"""
