"""Configurations, and what a snapshot of a machine must find again."""

import json
from dataclasses import replace

import pytest

from onionskin.errors import FormatError, StateError
from onionskin.machine.hypervisor import Configuration, Identity, Recorded, compare

MIB = 1 << 20
RECORDED = Recorded("qemu", "7.2.22", "pc-i440fx-7.2", "tcg", "max", 256 * MIB, 1, ("virtio-blk-pci", "vmgenid"))


def test_a_configuration_reads_back_as_it_was() -> None:
    made = Configuration(256 * MIB, kernel="/boot/vmlinuz", append="quiet", qemu_args=("-vnc", "none"))
    assert Configuration.from_json(made.to_json()) == made


def test_a_configuration_of_a_newer_onionskin_is_refused_and_names_what_is_new() -> None:
    text = json.dumps(json.loads(Configuration(MIB).to_json()) | {"tpm": True})
    with pytest.raises(FormatError, match="tpm"):
        Configuration.from_json(text)


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "7", "{}", "nothing", '{"memory_bytes": "1048576"}', '{"memory_bytes": 1048576, "qemu_args": [1]}'),
        "[" * 100_000,  # deeper than JSON is read
    ],
)
def test_what_is_no_configuration_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        Configuration.from_json(text)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ({"memory_bytes": MIB + 1}, "RAM"),
        ({"cpus": 0}, "CPUs"),
        ({"kernel": "vmlinuz"}, "absolute"),
        ({"append": "quiet"}, "without a kernel"),
        ({"network": "bridge"}, "bridge"),
        ({"hypervisor": "xen"}, "xen"),
        ({"qemu_args": ("a\0",)}, "zero byte"),
    ],
)
def test_a_configuration_that_no_machine_can_have_is_refused(fault: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Configuration(**({"memory_bytes": 64 * MIB} | fault))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"version": "10.0.2"}, "7.2.22, and would be 10.0.2"),
        ({"machine_type": "pc-q35-7.2"}, "machine type"),
        ({"cpu_model": "qemu64"}, "CPU model was max"),
        ({"accelerator": "kvm"}, "accelerator"),
        ({"memory_bytes": 512 * MIB}, "256 MiB, and would be 512 MiB"),
        ({"cpus": 2}, "number of CPUs"),
        ({"devices": ("virtio-blk-pci",)}, "without vmgenid"),
        ({"devices": ("vmgenid", "virtio-blk-pci")}, "another order"),
    ],
)
def test_a_difference_is_refused_by_its_name(other: dict[str, object], named: str) -> None:
    with pytest.raises(StateError, match=named):
        compare(RECORDED, replace(RECORDED, **other))


def test_a_later_release_of_the_same_version_runs_it() -> None:
    compare(RECORDED, replace(RECORDED, version="7.2.23"))


def test_what_was_recorded_reads_back() -> None:
    assert Recorded.from_json(RECORDED.to_json()) == RECORDED


def test_each_identity_has_addresses_of_its_own() -> None:
    a, b = Identity(), Identity()
    assert len({a.mac(0), a.mac(1), b.mac(0), b.mac(1)}) == 4
    assert a.mac(0) == replace(a).mac(0)
