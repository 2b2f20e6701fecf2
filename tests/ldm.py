"""A diffusers pipeline's weights under the names of the original single-file checkpoints (CompVis, Stability AI)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Rules = Iterable[tuple[str, str]]

_RESNET = [
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.conv_shortcut\.", ".skip_connection."),
]
_UNET_ENDS = [
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^add_embedding\.linear_1", "label_emb.0.0"),
    (r"^add_embedding\.linear_2", "label_emb.0.2"),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.0", "middle_block.0"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
]
_VAE = [
    (r"\.down_blocks\.(\d)\.resnets", r".down.\1.block"),
    (r"\.down_blocks\.(\d)\.downsamplers\.0", r".down.\1.downsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_(\w)", r"mid.attn_1.\1"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
]
_OPEN_CLIP = [
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^final_layer_norm", "ln_final"),
    (r"^encoder\.layers", "transformer.resblocks"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"\.fc1\.", ".c_fc."),
    (r"\.fc2\.", ".c_proj."),
    (r"\.self_attn", ".attn"),
]


def save_single_file(path: Path, pipeline: Any, dtype: torch.dtype = torch.float32) -> Path:
    """Write an SD 1, SD 2 or SDXL pipeline as one .safetensors file."""
    tensors = _prefixed("model.diffusion_model.", _unet(pipeline.unet))
    tensors |= _prefixed("first_stage_model.", _vae(pipeline.vae))
    if hasattr(pipeline, "text_encoder_2"):
        tensors |= _prefixed("conditioner.embedders.0.transformer.text_model.", _plain(pipeline.text_encoder))
        tensors |= _prefixed("conditioner.embedders.1.model.", _open_clip(pipeline.text_encoder_2))
    elif pipeline.unet.config.use_linear_projection:
        tensors |= _prefixed("cond_stage_model.model.", _open_clip(pipeline.text_encoder))
    else:
        tensors |= _prefixed("cond_stage_model.transformer.text_model.", _plain(pipeline.text_encoder))
    save_file({name: tensor.detach().to(dtype).contiguous() for name, tensor in tensors.items()}, path)
    return path


def _renamed(name: str, rules: Rules) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _plain(encoder: Any) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}


def _unet(unet: Any) -> dict[str, Tensor]:
    layers = unet.config.layers_per_block
    rules = [*_UNET_ENDS]
    for i, (at, kind) in itertools.product(range(4), enumerate(("resnets", "attentions"))):
        for j in range(layers + 1):
            rules.append((rf"^down_blocks\.{i}\.{kind}\.{j}", f"input_blocks.{(layers + 1) * i + j + 1}.{at}"))
            rules.append((rf"^up_blocks\.{i}\.{kind}\.{j}", f"output_blocks.{(layers + 1) * i + j}.{at}"))
        rules.append((rf"^down_blocks\.{i}\.downsamplers\.0\.conv", f"input_blocks.{(layers + 1) * (i + 1)}.0.op"))
    for i, block in enumerate(unet.up_blocks):
        at = 2 if getattr(block, "attentions", None) else 1
        rules.append((rf"^up_blocks\.{i}\.upsamplers\.0\.conv", f"output_blocks.{(layers + 1) * i + layers}.{at}.conv"))
    found = {}
    for name, tensor in unet.state_dict().items():
        inner = _RESNET if ".resnets." in name else []
        found[_renamed(name, [*inner, *rules])] = tensor
    return found


def _vae(vae: Any) -> dict[str, Tensor]:
    last = len(vae.config.up_block_types) - 1
    up = [(rf"decoder\.up_blocks\.{i}\.resnets", f"decoder.up.{last - i}.block") for i in range(last + 1)]
    up += [(rf"decoder\.up_blocks\.{i}\.upsamplers\.0", f"decoder.up.{last - i}.upsample") for i in range(last + 1)]
    found = {}
    for name, tensor in vae.state_dict().items():
        square = ".attentions." in name and tensor.ndim == 2  # the originals had 1x1 convolutions there
        found[_renamed(name, [*up, *_VAE])] = tensor[:, :, None, None] if square else tensor
    return found


def _open_clip(encoder: Any) -> dict[str, Tensor]:
    tensors = _plain(encoder)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif "q_proj" in name:  # open_clip keeps the three projections in one tensor
            parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            whole = _renamed(name, _OPEN_CLIP).replace(".q_proj.", ".in_proj_")
            found[whole] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            found[_renamed(name, _OPEN_CLIP)] = tensor
    return found
