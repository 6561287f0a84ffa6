"""Uses of the public names that a type checker has to refuse, each marked `# wrong`, beside right ones that it has to take.

Never run: tools/check_typing.py hands it to mypy and to pyright.
"""

import mmap
from pathlib import Path
from typing import Literal

import numpy

import onionskin
from onionskin.images import export_image, import_image

with onionskin.Store(Path("vms")) as store:
    store.create("a", size="1G", wipe="zero")
    store.create("b", size=1 << 30, base=Path("image.raw"), wipe="release")
    store.create("c", size="1G", wipe="shred")  # wrong
    store.create("d", size="1G", base=7)  # wrong
    store.clone("a", "snapshot", "e", wipe="zero")
    store.clone("a", "snapshot", "f", wipe="none")  # wrong
    onionskin.Store(7)  # wrong
    onionskin.Store("vms", group=["disk"])  # wrong

    volume = store.open("a")
    store.create("g", size="1G", wipe=volume.wipe, block_size=volume.block_size)
    store.create("h", size="1G", wipe=store.info("a").wipe)
    store.set_defaults(wipe=store.defaults().wipe)
    store.set_defaults(wipe=store.store_info().default_wipe)
    volume.block_size = 8192  # wrong
    volume.write(0, b"bytes")
    volume.write(0, bytearray(4096))
    volume.write(0, memoryview(b"view"))
    volume.write(0, numpy.zeros(4096, numpy.uint8))
    volume.write(0, "text")  # wrong
    volume.write(0, 4096)  # wrong
    volume.write("0", b"bytes")  # wrong
    volume.readinto(0, bytearray(4096))
    volume.readinto(0, memoryview(bytearray(4096)))
    volume.readinto(0, mmap.mmap(-1, 4096))
    volume.readinto(0, numpy.zeros(4096, numpy.uint8))
    volume.readinto(0, b"read only")  # wrong
    volume.readinto(0, "text")  # wrong
    volume.write_blocks([1, 2], b"x" * 8192)
    volume.write_blocks([1, 2], "text")  # wrong

    held: int = store.usage("a")[0].bytes_held
    name: str = volume.usage()[0].nothing  # wrong
    first: numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.uint8]] = volume.read_blocks([0])
    text: str = volume.read(0, 1)  # wrong

    store.open("a", mode="r").close()
    store.open("a", mode="rw")  # wrong
    machine = store.open_machine("lab")
    machine.snapshot("b", mode="live")
    machine.snapshot("c", mode="off")  # wrong
    state: Literal["off", "running", "paused", "failed"] = machine.state
    import_image(store, "x", "v", format="qcow2")
    import_image(store, "x", "v", format="qed")  # wrong
    export_image(volume, "out.vmdk", format="vmdk")
    export_image(volume, "out.vmdk", format="vmkd")  # wrong
    severities: list[Literal["error", "notice"]] = [problem.severity for problem in store.check()]
    kinds: list[Literal["head", "snapshot", "layer", "base"]] = [node.kind for node in store.tree()]
