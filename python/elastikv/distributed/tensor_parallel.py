"""A transformers model split among the ranks of a group: each holds a share of the heads and of the MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from elastikv.errors import InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of Llama's kind of layers: what is split by its output, and what by its input, whose parts are summed.
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWS = ("o_proj", "down_proj")


def split(model: PreTrainedModel, group: dist.ProcessGroup | None = None) -> PreTrainedModel:
    """Keeps this rank's share of the model, in place, and returns it. Every rank calls it with the same weights.

    For models of Llama's kind (Llama, Mistral, Qwen, ...): attention of q_proj, k_proj, v_proj and o_proj, MLPs of
    gate_proj, up_proj and down_proj, all linear. Heads and MLPs are split evenly, the rest is on every rank. The config
    has the rank's heads then, so that ``ElasticCache(model.config, ..., ranks=ranks)`` holds its share of keys and
    values. Each layer sums twice over the group: group's backend must serve the model's device, and be NCCL for CUDA
    graphs. All ranks get the same logits.

    Raises InvalidArgument where heads or MLPs do not divide, or a layer is of another kind; nothing has changed then.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise InvalidArgument("there is no process group: call torch.distributed.init_process_group first")
    count, rank = dist.get_world_size(group), dist.get_rank(group)
    if rank < 0:
        raise InvalidArgument(f"rank {dist.get_rank()} is not in the group")
    config: Any = model.config.get_text_config(decoder=True)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % count or kv_heads % count:
        raise InvalidArgument(f"{heads} heads on {kv_heads} KV heads can't be split evenly among {count} ranks")
    parts = _parts(model, count)
    for parent, name, linear in parts:
        setattr(parent, name, _share(linear, name, rank, count, group))
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads  # else it follows from the heads
    config.num_attention_heads, config.num_key_value_heads = heads // count, kv_heads // count
    return model


class SummedLinear(torch.nn.Linear):
    """A linear layer of which each rank of the group has some inputs: what they give is summed on all."""

    group: dist.ProcessGroup | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = super().forward(input)
        dist.all_reduce(output, group=self.group)
        return output


def _parts(model: torch.nn.Module, count: int) -> list[tuple[torch.nn.Module, str, torch.nn.Linear]]:
    """What is to be split: parent, name and layer, checked."""
    found: list[tuple[torch.nn.Module, str, torch.nn.Linear]] = []
    for path, module in model.named_modules():
        own = {name: child for name, child in module.named_children() if name in COLUMNS + ROWS}
        for name, child in own.items():
            if type(child) is not torch.nn.Linear:
                raise InvalidArgument(f"{path}.{name} is a {type(child).__name__}, not a linear layer")
            size = child.out_features if name in COLUMNS else child.in_features
            if size % count:
                raise InvalidArgument(f"{path}.{name} has {size} features, which {count} ranks can't share evenly")
            found.append((module, name, child))
        attends = type(module).__name__.endswith("Attention")
        if (attends and not {"q_proj", "k_proj", "v_proj", "o_proj"} <= own.keys()) or (
            "gate_proj" in own and not {"up_proj", "down_proj"} <= own.keys()
        ):
            raise InvalidArgument(f"{path}, a {type(module).__name__}, is not made of layers like Llama's")
    if not found:
        raise InvalidArgument(f"a {type(model).__name__} has no layers like Llama's")
    return found


def _share(
    whole: torch.nn.Linear, name: str, rank: int, count: int, group: dist.ProcessGroup | None
) -> torch.nn.Linear:
    by_output = name in COLUMNS
    weight = (
        whole.weight.detach().chunk(count, 0 if by_output else 1)[rank].clone(memory_format=torch.contiguous_format)
    )
    bias = None if whole.bias is None else whole.bias.detach()
    kind = torch.nn.Linear if by_output else SummedLinear
    share = kind(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    share.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        # One rank adds it to the sum.
        bias = bias.chunk(count)[rank].clone() if by_output else bias if rank == 0 else torch.zeros_like(bias)
        share.bias = torch.nn.Parameter(bias, requires_grad=False)
    if isinstance(share, SummedLinear):
        share.group = group
    return share.train(whole.training)
