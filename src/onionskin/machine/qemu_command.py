"""QEMU's command line for a machine, and what of it a snapshot must find again.

What must hold: names of sockets are relative to the machine's directory, in which QEMU runs, so they fit in an address
however deep the store is. No argument that the user gives can undo what a snapshot needs: those are refused by name. So are
devices that write RAM past what notes writes, balloons, which would take it out of the file that forks share, and variable
stores of UEFI, which no snapshot would have.

What QEMU cannot save the state of is refused too, when a machine is made where it is known by name, and by QEMU itself when
it starts (`-only-migratable`), so that it need not be known here. The least surprise is to hear of it then: a machine that
runs for a week, and is then found to have no snapshot, cannot be helped any more. QEMU counts a directory that is shared
with the guest (9p) only while the guest has it mounted. That is refused from the first all the same: whether a snapshot can
be taken would be the guest's to decide, and what it writes there would be in no snapshot, and shared by forks.
"""

import json
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onionskin.base.linux_kernel import release_of_file
from onionskin.errors import StateError
from onionskin.machine.hypervisor import Configuration, Identity, Recorded

if TYPE_CHECKING:
    from pathlib import Path

QMP, CONSOLE, AGENT, PRELOAD, LOG = "qmp", "console", "agent", "preload", "qemu.log"
SOCKETS = (QMP, CONSOLE, AGENT, PRELOAD)
EMPTY_RAM, STAND_IN = "ram.empty", "ram.stand-in"
SOCKET_BYTES_MAX = 107
# The guest waits so long for a disk whose server is gone. Then the machine is stopped, and goes on when it is back.
RECONNECT_SECONDS = 60
AGENT_PORT = "org.qemu.guest_agent.0"

# What the configuration says; further arguments cannot say it again.
_OURS = {
    "-m": "give memory= instead",
    "-smp": "give cpus= instead, which is sockets, cores and threads in one",
    "-cpu": "give cpu_model= instead",
    **dict.fromkeys(("-M", "-machine"), "give machine_type= instead"),
    "-numa": "the RAM of a machine is one piece, since snapshots find it so",
    **{f"-{one}": f"give {one}= instead" for one in ("kernel", "initrd", "append")},
    **dict.fromkeys(
        ("-S", "-daemonize", "-incoming", "-loadvm", "-pidfile", "-name", "-preconfig"), "onionskin starts the machine"
    ),
    **dict.fromkeys(("-readconfig", "-set"), "what it sets would not be looked at; give that as arguments"),
    **dict.fromkeys(
        ("-hda", "-hdb", "-hdc", "-hdd", "-fda", "-fdb", "-sd", "-mtdblock"),
        _NO_DISK := (
            "a snapshot would not have what the guest writes there; make it a disk of the machine, or give -drive with "
            "readonly=on"
        ),
    ),
    **dict.fromkeys(("-snapshot", "-replay", "-icount"), "the disks and the time of the machine are onionskin's"),
    **dict.fromkeys(("-mem-path", "-mem-prealloc"), "its RAM is onionskin's"),
    **dict.fromkeys(
        ("-chroot", "-runas", "-run-with"), "the process, its user and the files that it opens are onionskin's"
    ),
    "-pflash": "UEFI and its variable store are not supported: a snapshot would not have them; boot with SeaBIOS or kernel=",
}
_UEFI = re.compile(r"if=pflash|pflash[01]=|ovmf|edk2|\.fd\b", re.IGNORECASE)
_PAST_TRACKING = re.compile(
    r"vhost-user|vhost-scsi|vfio|vdpa|pvrdma|x-pci-proxy|ivshmem|virtio-mem|virtio-pmem|pc-dimm|nvdimm|memory-backend|balloon"
)
# QEMU has no code to save the state of these, whatever its version; what else there is, it refuses itself at a start.
_DRIVER = r"(?:^|driver['\"]?\s*[=:]\s*['\"]?)"
_NOT_SAVED = re.compile(rf"{_DRIVER}(nvme|usb-mtp|usb-wacom-tablet|virtio-input-host|rocker)\b")
_OF_SHARES = re.compile(rf"{_DRIVER}virtio-9p\b")
NOT_SAVED_SAID = "only-migratable"  # is in what QEMU says of it then
_NO_SHARE = (
    "QEMU saves no machine whose guest has a directory of the host mounted, and a snapshot would not have what it writes "
    "there; use a disk of the machine, or a network"
)
# These pass the guest's commands on to a disk of the host, also such as write, to a drive that is opened only to read.
_PAST_READ_ONLY = re.compile(r"\bscsi-(block|generic)\b")
# The host's disk writes what it reads there to RAM itself, at some time after it was told to, and no page says so.
_PAST_CACHE = re.compile(
    r"cache=(none|directsync)\b|\bcache\.direct=(on|true|yes)\b|\"(cache\.)?direct\"\s*:\s*true|=nvme\b"
)
# Arguments that make devices.
_OF_DEVICES = ("-device", "-vga", "-nic", "-net", "-usb", "-usbdevice", "-global", "-soundhw", "-audio", "-tpmdev")
# Options that take no value: what comes behind them is another option.
_ALONE = {
    *("-usb", "-enable-kvm", "-no-reboot", "-no-shutdown", "-no-acpi", "-no-hpet", "-no-fd-bootchk", "-nographic"),
    *("-nodefaults", "-no-user-config", "-only-migratable", "-s", "-full-screen", "-portrait", "-singlestep"),
    *("-enable-sync-profile", "-h", "-help", "-version", "-audio-help", "-xen-attach", "-xen-domid-restrict"),
    *("-win2k-hack", "-perfmap", "-jitdump", "-async-teardown", "-enable-fips", "-semihosting"),
}
# How QEMU writes that something is so; it takes no capitals, and no 1.
_YES = ("on", "yes", "true", "y")
# A socket that QEMU listens on, which is not in the machine's directory.
_OF_SOCKET, _LISTENS = (
    re.compile(r"(?:\bunix:|\bpath=|\baddr=)(/(?:[^,]|,,)+)"),
    re.compile(r",server(=on|=yes|,|$)|\bunix=on"),
)
_JSON_STRING = re.compile(r"""'((?:[^'\\]|\\.)*)'|"(?:[^"\\]|\\.)*\"""")
# Of a device, what may be another one each time.
_OF_CARDS = ("model=", "none", "nic")
_MAY_DIFFER = ("drive=", "netdev=", "chardev=", "mac=", "macaddr=", "guid=", "serial=")


def words(configuration: Configuration) -> list[tuple[str, str | None]]:
    """Return the user's arguments as (option, value).

    Raises
    ------
    StateError
        One of them cannot be given.
    """
    found: list[tuple[str, str | None]] = []
    for word in configuration.qemu_args:
        if len(word) > 1 and word.startswith("-"):  # no value of an option begins so: one that is refused hides nowhere
            found.append(("-" + word.lstrip("-"), None))
        elif found and found[-1][1] is None and found[-1][0] not in _ALONE:
            found[-1] = (found[-1][0], word)
        else:
            raise StateError(
                f"the argument {word!r} for QEMU belongs to no option; give options and their values in turn"
            )
    for option, value in found:
        _refuse(option, value or "")
    return found


def refuse_arguments(configuration: Configuration) -> None:
    """Raise StateError where one of the user's arguments cannot be given: before a machine is made that never starts.

    A directory that is shared with the guest is refused here alone. A machine that was made with one before may have
    snapshots, taken while it was not mounted, which none without it can load. It starts, and its guest cannot mount it.
    """
    for option, value in words(configuration):
        if option in ("-virtfs", "-fsdev"):
            raise StateError(f"the argument {option} for QEMU cannot be given: {_NO_SHARE}")
        if option == "-device" and _OF_SHARES.search(value or ""):
            raise StateError(f"the argument {option} {value} for QEMU cannot be given: {_NO_SHARE}")


def _refuse(option: str, value: str) -> None:
    if (why := _OURS.get(option)) is not None:
        raise StateError(f"the argument {option} for QEMU cannot be given: {why}")
    if option in ("-drive", "-bios", "-blockdev", "-global") and _UEFI.search(value):
        raise StateError(f"the argument {option} {value} for QEMU cannot be given: {_OURS['-pflash']}")
    if option in ("-drive", "-blockdev") and not _is_read_only(option, value):
        raise StateError(f"the argument {option} {value} for QEMU cannot be given: {_NO_DISK}")
    if option in ("-drive", "-blockdev") and _PAST_CACHE.search(value):
        raise StateError(
            f"the argument {option} {value} for QEMU cannot be given: what is read past the host's cache goes to RAM in a "
            "way that snapshots do not see; leave out cache=none, and what else says so"
        )
    if option == "-device" and _PAST_READ_ONLY.search(value):
        raise StateError(f"the argument {option} {value} for QEMU cannot be given: {_NO_DISK}")
    if option == "-device" and (found := _NOT_SAVED.search(value)):
        raise StateError(
            f"the argument {option} {value} for QEMU cannot be given: QEMU cannot save the state of {found[1]}, so no "
            "snapshot of the machine could be taken while it runs; use another device, such as a disk of the machine"
        )
    if found := _PAST_TRACKING.search(value):
        raise StateError(
            f"the argument {option} {value} for QEMU cannot be given: {found[0]} writes RAM, drops some, or has some, and "
            "snapshots do not see that"
        )


def own_sockets(configuration: Configuration) -> "list[Path]":
    """Return the sockets that the user's arguments have QEMU listen on, by a path that is the same for each machine.

    QEMU takes such a path from whoever listens there, without a word. One without a directory is in the machine's own.
    """
    from pathlib import Path

    found = []
    for option, value in words(configuration):
        path = _OF_SOCKET.search(value or "")
        if path is None or not (_LISTENS.search(value or "") or option == "-vnc") or "reverse" in (value or ""):
            continue
        found.append(Path(path[1].replace(",,", ",")))
    return found


def refuse_same_sockets(those: Sequence[Configuration]) -> None:
    """Raise StateError where several machines that are to run at once would listen on one socket."""
    paths = [path for one in those for path in dict.fromkeys(own_sockets(one))]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise StateError(
            f"each of these machines would listen on {twice}, as its arguments for QEMU say, and take it from the others; "
            "none was started; a path without a directory, as in unix:monitor, is another one for each machine"
        )


def _is_read_only(option: str, value: str) -> bool:
    """Whether QEMU opens a drive or a block node only to read, however that is written.

    What is said twice has to be said so both times: of -drive the first counts, and of -blockdev the last. Only the node
    itself is looked at: a key such as file.read-only is about another one.
    """
    if option == "-blockdev" and value.startswith("{"):
        return _json_says_read_only(value)
    said: list[bool] = []
    media: list[bool] = []
    for part in re.findall(r"(?:[^,]|,,)+", value):  # two commas are one of a file's name
        key, equals, text = part.partition("=")
        if option == "-drive" and not equals and key.removeprefix("no") in ("readonly", "read-only"):
            said.append(not key.startswith("no"))
        elif key == "read-only" or (key == "readonly" and option == "-drive"):
            said.append(text in _YES)
        elif key == "media" and option == "-drive":
            media.append(text == "cdrom")
    return (bool(said) and all(said)) or (bool(media) and all(media))


def _json_says_read_only(text: str) -> bool:
    """Whether a node that is written as JSON is only read. QEMU takes strings in single quotes, too."""
    text = _JSON_STRING.sub(lambda one: one[0] if one[1] is None else _in_double_quotes(one[1]), text)
    try:
        said = json.loads(text)
    except ValueError:
        return False
    return isinstance(said, dict) and said.get("read-only") is True


def _in_double_quotes(text: str) -> str:
    return '"' + text.replace("\\'", "'").replace('"', '\\"') + '"'


def accelerator(configuration: Configuration) -> str:
    """Return what runs the guest's instructions: the user's choice, or KVM where it can be used."""
    for option, value in words(configuration):
        if option == "-accel":
            return (value or "").partition(",")[0]
        if option == "-enable-kvm":
            return "kvm"
    return "kvm" if _has_kvm() else "tcg"


def _cpuinfo() -> str:
    with open("/proc/cpuinfo") as file:
        return file.read()


def _has_kvm() -> bool:
    """Whether the processor lets this host run machines. The device may be there without that, and QEMU then fails."""
    can = re.search(r"^flags\s*:.*\b(vmx|svm)\b", _cpuinfo(), re.MULTILINE)
    return bool(can) and os.access("/dev/kvm", os.R_OK | os.W_OK)


def recorded(configuration: Configuration, disks: int, version: str, machine_type: str) -> Recorded:
    """Return what a snapshot of this machine must find again."""
    accel = accelerator(configuration)
    return Recorded(
        "qemu",
        version,
        machine_type,
        accel,
        _model(configuration.cpu_model, accel),
        configuration.memory_bytes,
        configuration.cpus,
        devices(configuration, disks),
        release_of_file(configuration.kernel) if configuration.kernel else "",
    )


def _model(model: str, accel: str) -> str:
    """Return a CPU model; one that is the host's, with the name of the host's."""
    if accel == "tcg" or model.partition(",")[0] not in ("host", "max"):
        return model
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return f"{model} ({found[1] if found else 'unknown'})"


def devices(configuration: Configuration, disks: int) -> tuple[str, ...]:
    """Return the devices of a machine in order, without what may differ."""
    made = [value for option, value in _own_devices(configuration, disks, Identity()) if option == "-device"]
    for option, value in words(configuration):
        if option in _OF_DEVICES:
            made.append(_as_device(option, value or ""))
    return tuple(_without_what_differs(one) for one in made)


def _as_device(option: str, value: str) -> str:
    if option in ("-nic", "-net"):  # what is behind the card may be another network, or none
        value = ",".join(part for part in value.split(",") if part.startswith(_OF_CARDS))
    return value if option == "-device" else f"{option} {value}".strip()


def _without_what_differs(device: str) -> str:
    return ",".join(part for part in device.split(",") if not part.startswith(_MAY_DIFFER))


def _own_devices(configuration: Configuration, disks: int, identity: Identity) -> list[tuple[str, str]]:
    """Return the devices that every machine has, and what they stand on, as (option, value)."""
    found = [("-device", f"vmgenid,id=generation,guid={identity.generation}")]
    if configuration.agent:
        found += [
            ("-chardev", f"socket,id=agent,path={AGENT},server=on,wait=off"),
            ("-device", "virtio-serial-pci,id=ports"),
            ("-device", f"virtserialport,id=agent,chardev=agent,name={AGENT_PORT}"),
        ]
    for number in range(disks):
        # An error stops the machine: it goes on when the disk is back, and its file system has seen nothing.
        boot = f",bootindex={number}" if configuration.kernel is None else ""
        found.append(("-device", f"virtio-blk-pci,id=disk{number},drive=node{number},werror=stop,rerror=stop{boot}"))
    if configuration.network == "user":
        restrict = ",restrict=on" if configuration.is_isolated else ""
        found += [
            ("-netdev", f"user,id=net{restrict}"),
            ("-device", f"virtio-net-pci,id=nic,netdev=net,mac={identity.mac(0)}"),
        ]
    return found


def command(
    program: str,
    configuration: Configuration,
    *,
    name: str,
    machine_type: str,
    directory: "Path",
    ram_file: "Path",
    disks: Sequence[str],
    identity: Identity,
) -> list[str]:
    """Return the command line of a machine that is stopped before its first instruction."""
    given = words(configuration)
    options = dict(given)
    accel = [] if {"-accel", "-enable-kvm"} & set(options) else ["-accel", accelerator(configuration)]
    memory = (
        f"memory-backend-file,id=ram,size={configuration.memory_bytes >> 20}M,mem-path={_escaped(ram_file)},share=on"
    )
    made = [
        *(program, "-name", f"guest={_escaped(name)}", "-nodefaults", "-no-user-config", "-S", *accel),
        "-only-migratable",
        *("-machine", f"{machine_type},memory-backend=ram,usb=off", "-cpu", configuration.cpu_model),
        *("-smp", str(configuration.cpus), "-m", f"{configuration.memory_bytes >> 20}M", "-object", memory),
        *("-chardev", f"socket,id=qmp,path={QMP},server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=console,path={CONSOLE},server=on,wait=off", "-serial", "chardev:console"),
    ]
    if not {"-display", "-nographic", "-vnc", "-spice"} & set(options):
        made += ["-display", "none"]
    if configuration.kernel is not None:
        made += ["-kernel", configuration.kernel, "-append", configuration.append]
        if configuration.initrd is not None:
            made += ["-initrd", configuration.initrd]
    for number, uri in enumerate(disks):
        made += ["-blockdev", _node(number, uri, directory)]
    for option, value in _own_devices(configuration, len(disks), identity):
        made += [option, value]
    for option, text in _isolated(given) if configuration.is_isolated else given:
        made += [option] if text is None else [option, text]
    return made


def _escaped(text: "str | Path") -> str:
    return str(text).replace(",", ",,")


def node_name(number: int) -> str:
    """Return what QEMU calls a disk."""
    return f"node{number}"


def _node(number: int, uri: str, directory: "Path") -> str:
    path, export = nbd_address(uri)
    if path.parent == directory:
        path = path.relative_to(directory)  # QEMU runs there
    if len(os.fsencode(path)) > SOCKET_BYTES_MAX:
        raise StateError(f"the socket {path} of a disk has more than {SOCKET_BYTES_MAX} bytes; use a shorter path")
    return (
        f"driver=nbd,node-name={node_name(number)},server.type=unix,server.path={_escaped(path)},export={_escaped(export)},"
        f"reconnect-delay={RECONNECT_SECONDS},discard=unmap"
    )


def nbd_address(uri: str) -> "tuple[Path, str]":
    """Split the URI of a disk into its socket and its export.

    Raises
    ------
    ValueError
        It is not of the form ``nbd+unix:///EXPORT?socket=PATH``.
    """
    # Imported late: whoever makes a machine imports this module, to refuse arguments.
    from pathlib import Path
    from urllib.parse import parse_qs, unquote, urlsplit

    parts = urlsplit(uri)
    sockets = parse_qs(parts.query).get("socket", [])
    if parts.scheme != "nbd+unix" or len(sockets) != 1:
        raise ValueError(f"{uri!r} is no disk of a machine: write nbd+unix:///EXPORT?socket=PATH")
    return Path(sockets[0]), unquote(parts.path.removeprefix("/"))


def _isolated(given: list[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    """Return the user's arguments with networks that reach nothing, and with the same devices."""
    found: list[tuple[str, str | None]] = []
    for option, value in given:
        if option == "-netdev":
            id = next((part for part in (value or "").split(",") if part.startswith("id=")), None)
            if id is None:
                raise StateError(
                    f"the argument -netdev {value} for QEMU has no id=, by which a card names it; give one"
                )
            found.append((option, f"user,{id},restrict=on"))
        elif option in ("-nic", "-net") and value and not value.startswith(("none", "nic")):
            kept = [part for part in value.split(",") if part.startswith(("model=", "mac=", "id=", "name="))]
            found.append((option, ",".join(["user", "restrict=on", *kept])))
        else:
            found.append((option, value))
    return found
