"""Whether the forks of a machine draw random numbers of their own.

A Linux guest draws new randomness once its driver of the VM generation id (CONFIG_VMGENID) finds that this has changed.
Nothing outside tells whether the guest has the driver, except which kernel it booted.
"""

from onionskin.base.linux_kernel import numbers_of

# Linux has the driver from 5.18 on, and Debian's cloud kernels from 6.12 on; that of 6.1 was built without it.
_NOTICES_FROM = (6, 12)


def doubt_about(kernel: str) -> str:
    """Say what to expect of the random numbers of forks, by the release of the guest's kernel; nothing where all is well."""
    if not kernel or numbers_of(kernel) >= _NOTICES_FROM:
        return ""
    return (
        f"its guest booted Linux {kernel}, which may not notice that it was forked: forks then draw the same random numbers; "
        "make no keys in them, or use a kernel with CONFIG_VMGENID, as Debian's 6.12 has it"
    )
