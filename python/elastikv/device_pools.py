"""A shared pool for each of several devices, under one object."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import TracebackType

import torch

from elastikv import _core
from elastikv.errors import DeviceUnavailable, InvalidArgument

DeviceName = str | torch.device


class DevicePools:
    """One SharedMemoryPool a device; ``pools["cuda:1"]`` is that of a device.

    >>> pools = elastikv.DevicePools({"cuda:0": 40 << 30, "cuda:1": 40 << 30}, peers=True)
    >>> models = pools.register_model("chat", virtual_capacity=1 << 40)  # on each device
    >>> kv = elastikv.empty((0, 1024), (1 << 20, 1024), torch.bfloat16, models["cuda:1"])

    limits: physical bytes for each device. peers: each device may read and write the memory of all others, what is
    mapped now and later; see `allow_peers`. page_size, park_limit: as of SharedMemoryPool, for every device. name: the
    pools draw on ledgers that all processes share which give the same, called ``name.cpu``, ``name.cuda0``, ...

    All pools or none. A device that is not there raises DeviceUnavailable with those that are; one that drops out
    while it is in use raises CudaError, by the call that finds out, and the other devices' pools go on. Thread safe. A
    context manager: leaving it closes all pools.
    """

    def __init__(
        self,
        limits: Mapping[str, int] | Mapping[torch.device, int],
        *,
        peers: bool = False,
        page_size: int | None = None,
        park_limit: int | None = None,
        name: str | None = None,
    ) -> None:
        if not limits:
            raise InvalidArgument("no device is named: DevicePools({'cuda:0': bytes, ...})")
        self._pools: dict[str, _core.SharedMemoryPool] = {}
        with contextlib.ExitStack() as undo:
            for device, limit in limits.items():
                key = _key(device)
                if key in self._pools:
                    raise InvalidArgument(f"{key} is there twice")
                ledger = None if name is None else f"{name}.{key.replace(':', '')}"
                try:
                    pool = _core.SharedMemoryPool(limit, key, page_size=page_size, park_limit=park_limit, name=ledger)
                except DeviceUnavailable as missing:
                    raise DeviceUnavailable(f"{missing}. {_present()}") from missing
                self._pools[key] = undo.enter_context(pool)
            if peers:
                self.allow_peers()
            undo.pop_all()

    def allow_peers(self) -> None:
        """Each device may read and write what the others' pools map, now and later.

        Raises CudaError that names two devices that can't reach each other's memory; those before them stay allowed.
        """
        for key, pool in self._pools.items():
            for other in self._pools:
                if other != key:
                    pool.allow_peer(other)

    def register_model(
        self, id: str, virtual_capacity: int, *, reserve: int = 0, limit: int | None = None, priority: int = 0
    ) -> dict[str, _core.Model]:
        """The model on every device, by device; sizes are for each. On all or on none. Raises as SharedMemoryPool's."""
        models = {}
        with contextlib.ExitStack() as undo:
            for key, pool in self._pools.items():
                models[key] = pool.register_model(id, virtual_capacity, reserve=reserve, limit=limit, priority=priority)
                undo.callback(pool.unregister_model, id)
            undo.pop_all()
        return models

    def unregister_model(self, id: str) -> None:
        """Of every device that has it. Raises ModelNotFound where none has."""
        having = [pool for pool in self._pools.values() if id in pool.models()]
        for pool in having or list(self._pools.values())[:1]:
            pool.unregister_model(id)

    def trim(self) -> int:
        """Gives all parked memory back; returns the bytes freed."""
        return sum(pool.trim() for pool in self._pools.values())

    def close(self) -> None:
        """Closes every pool, also where one of them fails; the first failure is raised then."""
        with contextlib.ExitStack() as stack:
            for pool in self._pools.values():
                stack.callback(pool.close)

    def __enter__(self) -> DevicePools:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getitem__(self, device: DeviceName) -> _core.SharedMemoryPool:
        """Raises DeviceUnavailable for a device that has no pool here."""
        key = _key(device)
        if key not in self._pools:
            raise DeviceUnavailable(f"there is no pool for {key}: {', '.join(self._pools)} have one")
        return self._pools[key]

    def __contains__(self, device: DeviceName) -> bool:
        return _key(device) in self._pools

    def __iter__(self) -> Iterator[str]:
        return iter(self._pools)

    def __len__(self) -> int:
        return len(self._pools)

    def items(self) -> list[tuple[str, _core.SharedMemoryPool]]:
        return list(self._pools.items())


def _key(device: DeviceName) -> str:
    return "cuda:0" if str(device) == "cuda" else str(device)


def _present() -> str:
    present = [row["device"] for row in _core.devices() if row["available"]]
    return f"This machine has {', '.join(present)}"
