"""Low-rank adapters (LoRA, arXiv 2106.09685) on a backbone, through peft."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from mmbridge.errors import ConfigError


@dataclass(frozen=True)
class Lora:
    """Settings of the adapters; the defaults are NExT-GPT's (33.55 M parameters on a 7B LLaMA).

    Args:
        rank: Width of the low-rank update.
        alpha: The update is scaled by alpha / rank.
        dropout: Dropout on the adapters' input, in training.
        targets: Names of the linear layers that get an adapter.
    """

    rank: int = 32
    alpha: float = 32
    dropout: float = 0.1
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


def add_lora(model: Any, lora: Lora) -> dict[str, nn.Parameter]:
    """Insert adapters in float32 into a transformers model in place; only they require gradients.

    Returns:
        The adapters' parameters by name.

    Raises:
        ConfigError: No layer carries one of the target names.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = sorted(
        {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    )
    missing = [target for target in lora.targets if target not in linear]
    if missing:
        raise ConfigError(
            f"LoRA target {missing[0]!r} is no linear layer of this backbone; it has {', '.join(linear)}."
        )
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets), bias="none"
    )
    inject_adapter_in_model(config, model)
    adapters = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    for parameter in adapters.values():
        # Small updates vanish in the half precision of a frozen model.
        parameter.data = parameter.data.float()
    return adapters
