"""The control socket of a volume that is being served: its frames, the server's end, and the client's end."""
