"""Tiny models of the real classes: at most 2 M parameters, random weights, built offline in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pipelines.model import Model, from_pipeline

KINDS = ("sd1", "sd2", "sd2v", "sdxl")
_KNOWN = (
    "a an the of on in at and photo picture painting cat dog robot car ball cup tree house fish star cube cone toy "
    "red blue green snow grass sand beach street simple background sks hta my with blurry under"
)
WORDS = _KNOWN.split()  # one token each; everything else takes several ("mushroom", "teapot" ...)
_END = "</w>"


def tiny_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer: every text tokenizes, WORDS take one token each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in [*WORDS, "mus", "room"]:
        pieces = _split(word, merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    tokens = [*alphabet, *(letter + _END for letter in alphabet), *dict.fromkeys(a + b for a, b in merges)]
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    pieces = [*word[:-1], word[-1] + _END]
    for left, right in merges:  # a later merge never comes before an earlier one
        at = 0
        while at < len(pieces) - 1:
            if pieces[at : at + 2] == [left, right]:
                pieces[at : at + 2] = [left + right]
            at += 1
    return pieces


def tiny_text_encoder(tokenizer: CLIPTokenizer, width: int, projection: int | None = None) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=projection or width,
        hidden_act="quick_gelu" if width == 32 else "gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16, 32),  # two halvings: one latent cell is 4 pixels
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
    )


_SD: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_UNETS: dict[str, dict[str, Any]] = {
    "sd1": _SD | {"cross_attention_dim": 32, "attention_head_dim": 4},
    "sd2": _SD | {"cross_attention_dim": 48, "attention_head_dim": (2, 4), "use_linear_projection": True},
    "sdxl": _SD
    | {
        "cross_attention_dim": 32 + 48,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
    },
}


def tiny_pipeline(kind: str = "sd1", seed: int = 0) -> Any:
    """The diffusers pipeline of that kind; equal seeds give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction" if kind == "sd2v" else "epsilon",
        )
        tokenizer = tiny_tokenizer()
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(**_UNETS[kind.removesuffix("v")]).eval(),
            "vae": tiny_vae().eval(),
            "text_encoder": tiny_text_encoder(tokenizer, 48 if kind.startswith("sd2") else 32).eval(),
            "tokenizer": tokenizer,
            "scheduler": scheduler,
        }
        if kind == "sdxl":
            parts |= {"tokenizer_2": tiny_tokenizer(), "text_encoder_2": tiny_text_encoder(tokenizer, 48, 24).eval()}
            pipeline = StableDiffusionXLPipeline(**parts)
        else:
            pipeline = StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_model(kind: str = "sd1", seed: int = 0) -> Model:
    """An Attune model of one of KINDS; `tiny_pipeline(kind, seed)` has the same weights."""
    return from_pipeline(tiny_pipeline(kind, seed), f"tiny-{kind}-{seed}")


def tiny_folder(path: Path, kind: str = "sd1", seed: int = 0, **options: Any) -> Path:
    """Save the tiny pipeline as a diffusers folder; `options` go to `save_pretrained` (variant="fp16" ...)."""
    tiny_pipeline(kind, seed).save_pretrained(path, **options)
    return path
