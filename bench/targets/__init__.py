"""Every figure that onionskin has to reach, each measured beside its peers: `python -m targets`, in bench."""
