"""What a checkpoint of Lightning leaves out, and a run needs to go on as if it had not stopped."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor


def states_of_processes(trainer: Trainer, state: dict[str, Any]) -> list[dict[str, Any]]:
    """This state and those of the other processes, by rank, with each process's random states; all processes call."""
    state = {**state, "random": random_state(trainer.strategy.root_device)}
    if trainer.world_size == 1:
        return [state]
    states: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(states, state)
    return states


def state_of_process(trainer: Trainer, states: list[dict[str, Any]]) -> dict[str, Any]:
    """This process's of `states_of_processes`, its random states restored; empty where there were more or fewer."""
    if len(states) != trainer.world_size:
        rank_zero_info(
            f"the checkpoint is of {len(states)} processes, and here are {trainer.world_size}: random numbers, of "
            "dropout for instance, differ from those of the run that stopped"
        )
        return {}
    state = states[trainer.global_rank]
    set_random_state(trainer.strategy.root_device, state["random"])
    return state


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's generators, the CPU's and the device's."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state(device).cpu()
    return state


def set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Go on from `random_state`, with what of it there is a generator for."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type in state and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(state[device.type].cpu(), device)
