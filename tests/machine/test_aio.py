"""Machines and pools, awaited: what they do is what their twins do, and nothing is left of them."""

import asyncio
from pathlib import Path

import pytest
from support.guests import Console, configuration

import onionskin
from onionskin import aio

pytestmark = pytest.mark.slow  # each starts several processes


def wait_ticks(machine: aio.Machine) -> None:
    with Console(machine.sync._directory / "console") as console:
        console.wait_ticks()


async def lab_of(store: aio.Store, qemu: list[str]) -> aio.Machine:
    one = configuration(qemu)
    return await store.create_machine(
        "lab", disks=["web", "data"], memory="16M", program=one.program, qemu_args=one.qemu_args
    )


def test_a_machine_is_started_taken_put_back_and_deleted_by_awaiting(vms: Path, qemu: list[str]) -> None:
    async def main() -> None:
        async with aio.Store(vms) as store:
            lab = await lab_of(store, qemu)
            await lab.start()
            try:
                await store.run(wait_ticks, lab)
                assert (await lab.snapshot("ready")).name == "ready"
                assert await lab.pause()
                assert await lab.state() == "paused"
                await lab.revert("ready")
                assert [one.name for one in await lab.snapshots()] == ["ready"]
                with pytest.raises(onionskin.StateError, match="runs already"):
                    await lab.start()
            finally:
                await lab.stop(force=True)
            assert (await (await store.open_machine("lab")).status())["state"] == "off"
            await lab.delete(recursive=True)
            assert await store.machines() == []

    asyncio.run(main())


def test_a_fork_comes_from_a_pool_that_ends_with_its_block_also_where_the_task_is_cancelled(
    vms: Path, qemu: list[str]
) -> None:
    forked: list[str] = []

    async def use(lab: aio.Machine) -> None:
        async with lab.pool("ready", warm=1) as pool:
            await pool.wait()
            assert (await pool.status())["ready"] == 1
            assert [one.snapshot for one in await lab.pools()] == ["ready"]
            (fork,) = await lab.fork("ready", names=["task"])
            forked.append(await fork.state())
            await fork.stop(force=True)
            await fork.delete()
            asyncio.current_task().cancel()  # type: ignore[union-attr]
            await asyncio.sleep(3600)

    async def main() -> None:
        async with aio.Store(vms) as store:
            lab = await lab_of(store, qemu)
            await lab.start()
            try:
                await store.run(wait_ticks, lab)
                await lab.snapshot("ready")
            finally:
                await lab.stop(force=True)
            with pytest.raises(asyncio.CancelledError):
                await asyncio.create_task(use(lab))
            assert forked == ["running"]
            assert await lab.pools() == []
            assert [one.name for one in await store.machines()] == ["lab"]

    asyncio.run(main())
