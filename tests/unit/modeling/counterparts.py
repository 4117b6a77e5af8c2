"""Names of the same weights in `transformers`, whose implementation the tests run beside ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

# In order; patterns of several spellings because `transformers` has renamed its modules over time.
SWIN_RULES = (
    (r"^(model\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(model\.)?embeddings\.norm\.", "patch_embed.norm."),
    (r"^hidden_states_norms\.(?:stage)?(\d+)\.", r"norm\1."),
    (r"^(model\.)?encoder\.layers\.", "layers."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.relative", ".attn.relative"),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
TRANSFORMER_RULES = (
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.(?:mlp\.)?fc([12])\.", r".linear\1."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.([qkv])_proj\.", r".\1."),
    (r"^decoder\.layernorm\.", "decoder.norm."),
)
TRIPLES = (("query", "key", "value"), ("q", "k", "v"))


def randomize(module: nn.Module, scale: float = 0.3) -> None:
    """Fill every parameter at random, also biases and norms, so that none can be left out unnoticed."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.normal_(0, fan_in**-0.5 if fan_in > 1 else scale)
            else:
                parameter.normal_(float("norm" in name and name.endswith("weight")), scale)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference by largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def swin_weights(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `MaskFormerSwinBackbone` → state dict of `SwinBackbone`."""
    renamed = {_rename(name, SWIN_RULES): tensor for name, tensor in theirs.items()}
    packed = _pack(renamed, "qkv.weight", "qkv.bias")
    # Their model ends in a norm that the backbone does not use.
    unused = re.compile(r"^model\.layernorm\.|relative_position_index$")
    return {name: tensor for name, tensor in packed.items() if not unused.search(name)}


def transformer_weights(theirs: Mapping[str, Tensor], decoder: bool) -> dict[str, Tensor]:
    """State dict of a DETR encoder or decoder of theirs → state dict of our `TransformerEncoder` or `…Decoder`."""
    last_norm = ".norm3." if decoder else ".norm2."
    rules = (*TRANSFORMER_RULES, (r"\.final_layer_norm\.", last_norm), (r"^layernorm\.", "norm."))
    renamed = {_rename(name, rules): tensor for name, tensor in theirs.items()}
    return _pack(renamed, "in_proj_weight", "in_proj_bias")


def fpn_weights(theirs: Mapping[str, Tensor], finer: int) -> dict[str, Tensor]:
    """State dict of their pixel decoder with `finer` lateral levels → state dict of `FPNPixelDecoder`."""
    parts = {"0.weight": "conv.weight", "1.weight": "norm.weight", "1.bias": "norm.bias"}
    out = {}
    for name, tensor in theirs.items():
        if name.startswith("fpn.stem."):
            out[f"output.{finer}.{parts[name.removeprefix('fpn.stem.')]}"] = tensor
        elif match := re.match(r"fpn\.layers\.(\d+)\.(proj|block)\.(.*)", name):
            # They count from the coarsest level, we from the finest.
            place = {"proj": "lateral", "block": "output"}[match[2]]
            out[f"{place}.{finer - 1 - int(match[1])}.{parts[match[3]]}"] = tensor
        else:
            out[name.replace("mask_projection.", "embedding.")] = tensor
    return out


def network_weights(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `MaskFormerForInstanceSegmentation` with a Swin backbone → state dict of `MaskFormerNetwork`."""

    def below(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in theirs.items() if name.startswith(prefix)}

    head = {}
    for name, tensor in below("model.transformer_module.").items():
        if not name.startswith("decoder."):
            head[name.replace("queries_embedder.", "query_positions.")] = tensor
    decoder = transformer_weights(below("model.transformer_module.decoder."), decoder=True)
    head |= {f"transformer.decoder.{name}": tensor for name, tensor in decoder.items()}
    head |= {f"class_head.{name}": tensor for name, tensor in below("class_predictor.").items()}
    for name, tensor in below("mask_embedder.").items():
        head["mask_head.layers." + name.replace(".0.", ".")] = tensor
    return (
        {f"backbone.{k}": v for k, v in swin_weights(below("model.pixel_level_module.encoder.")).items()}
        | {f"pixel_decoder.{k}": v for k, v in fpn_weights(below("model.pixel_level_module.decoder."), 3).items()}
        | {f"head.{k}": v for k, v in head.items()}
    )


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _pack(weights: dict[str, Tensor], weight_name: str, bias_name: str) -> dict[str, Tensor]:
    """Queries, keys and values, which they keep apart, stacked as we keep them."""
    out = {}
    for name, tensor in weights.items():
        *prefix, part, kind = name.split(".")
        triple = next((t for t in TRIPLES if part in t), None)
        if triple is None:
            out[name] = tensor
        elif part == triple[0]:
            parts = [weights[".".join([*prefix, p, kind])] for p in triple]
            out[".".join([*prefix, weight_name if kind == "weight" else bias_name])] = torch.cat(parts)
    return out
