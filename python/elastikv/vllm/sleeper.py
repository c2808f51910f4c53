"""`elastikv sleep MODEL` and `elastikv wake MODEL` for an engine of vLLM.

Requests stay where they are, as with vLLM's own pause: those that run keep their KV cache, which goes to the host, and
go on when the engine wakes; those that come wait. Between the two the scheduler plans nothing, so no step can want
memory, and what ends meanwhile gives its blocks back at the end (`KVMemory.free`).
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreRequestType

from elastikv.orders import obey
from elastikv.vllm.memory import KVMemory

logger = logging.getLogger("vllm.elastikv")

ALL = 1 << 62  # bytes: whatever is idle
ROOM_TIMEOUT = 30.0  # seconds in which others must make room for what wakes


class Sleeper:
    """Of one engine. fall_asleep and wake_up may be called from any thread."""

    def __init__(self, core: Any, memory: KVMemory) -> None:
        """core: vLLM's EngineCore, whose steps hold `between_steps`."""
        self._core, self._memory = core, memory
        # Held during each step, so that whoever has it knows that all of the engine's work is enqueued.
        self.between_steps = threading.RLock()
        self._before: Any = None  # the scheduler's state before it fell asleep
        self._weights = False  # whether vLLM's weights sleep, too
        obey(memory.model, sleep=self.fall_asleep, wake=self.wake_up)

    @property
    def asleep(self) -> bool:
        return self._before is not None

    def fall_asleep(self) -> None:
        """Once the step under way is over. All or nothing; nothing where it sleeps already.

        Raises what Model.pause raises. Where the weights fail to sleep and others took the room meanwhile, the KV
        cache sleeps on until it is woken.
        """
        scheduler = self._core.scheduler
        before = scheduler.pause_state
        if self.asleep:
            with self.between_steps:
                if self.asleep:
                    self._put_weights_to_sleep()  # where they failed to
            return
        scheduler.set_pause_state(PauseState.PAUSED_ALL)  # or steps would follow each other too closely to come between
        try:
            with self.between_steps:
                self._use_device()
                pool = scheduler.kv_cache_manager.block_pool
                pool.end_step(idle=True)
                pool.give_up(ALL)  # prefixes that nobody uses are not worth a copy
                self._before = before
                try:
                    with pool.step_lock:
                        self._memory.pause()
                    try:
                        self._put_weights_to_sleep()
                    except BaseException:
                        with pool.step_lock:
                            self._memory.resume(ROOM_TIMEOUT)
                        raise
                except BaseException:
                    if not self._memory.asleep:  # else others took the room meanwhile: it sleeps until it is woken
                        self._before = None
                    raise
        except BaseException:
            if not self.asleep:
                scheduler.set_pause_state(before)
            raise
        logger.info("the KV cache sleeps, by order; requests wait")

    def _put_weights_to_sleep(self) -> None:
        executor = self._core.model_executor
        if self._core.vllm_config.model_config.enable_sleep_mode and not executor.is_sleeping:
            executor.sleep(1)
            self._weights = True

    def wake_up(self, *, resume: bool = True) -> None:
        """Requests go on; not with resume=False, where vLLM itself is about to let them. Nothing where it is awake.

        Raises OutOfPhysicalMemory where others hold the memory and don't give it up in time; it sleeps on then.
        """
        scheduler = self._core.scheduler
        with self.between_steps:
            if not self.asleep:
                return
            self._use_device()
            executor = self._core.model_executor
            step_lock = scheduler.kv_cache_manager.block_pool.step_lock
            with step_lock:
                self._memory.resume(ROOM_TIMEOUT)  # first, as it is what others may refuse
            try:
                if self._weights and executor.is_sleeping:
                    executor.wake_up()
            except BaseException:
                with step_lock:
                    self._memory.pause()
                raise
            self._weights = False
            before, self._before = self._before, None
            if resume and scheduler.pause_state == PauseState.PAUSED_ALL:  # else vLLM has paused it meanwhile
                scheduler.set_pause_state(before)
        queue = getattr(self._core, "input_queue", None)
        if queue is not None:  # of an engine in a process of its own, which sleeps on it
            queue.put_nowait((EngineCoreRequestType.WAKEUP, None))
        logger.info("the KV cache is awake, by order")

    def _use_device(self) -> None:
        if self._memory.device.type == "cuda":
            torch.cuda.set_device(self._memory.device)
