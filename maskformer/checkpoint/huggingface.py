"""Names of Hugging Face's MaskFormer (`MaskFormerForInstanceSegmentation` and `MaskFormerModel` of transformers).

They keep queries, keys and values apart, which are one tensor of ours, and count the levels of the pixel decoder from
the coarsest, which we count from the finest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from maskformer.checkpoint.exporting import relative_position_index
from maskformer.checkpoint.renaming import Rules, compile_rules, translate
from maskformer.errors import UserError

_ENCODER = "model.pixel_level_module.encoder."
_FPN = "model.pixel_level_module.decoder.fpn."
_TRANSFORMER = "model.transformer_module."
_STAGE, _BODY = _ENCODER + "encoder.stages.{a}.layers.{b}.", "network.backbone.body.layer{a+1}.{b}."
_BLOCK, _OUR_BLOCK = _ENCODER + "model.encoder.layers.{a}.blocks.{b}.", "network.backbone.layers.{a}.blocks.{b}."
_LAYER, _OUR_LAYER = _TRANSFORMER + "decoder.layers.{a}.", "network.head.transformer.decoder.layers.{a}."
_TRIPLES = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"))
_PROJECTION = re.compile(rf"(.*\.)({'|'.join(part for triple in _TRIPLES for part in triple)})\.(weight|bias)")
_JOINED = re.compile(r"(.*\.)\{(\w+),(\w+),(\w+)\}\.(weight|bias)")

_RULES = (
    (_ENCODER + "embedder.embedder.convolution.{*}", "network.backbone.body.conv1.{*}"),
    (_ENCODER + "embedder.embedder.normalization.{*}", "network.backbone.body.bn1.{*}"),
    (_STAGE + "shortcut.convolution.{*}", _BODY + "downsample.0.{*}"),
    (_STAGE + "shortcut.normalization.{*}", _BODY + "downsample.1.{*}"),
    (_STAGE + "layer.{c}.convolution.{*}", _BODY + "conv{c+1}.{*}"),
    (_STAGE + "layer.{c}.normalization.{*}", _BODY + "bn{c+1}.{*}"),
    (_ENCODER + "model.embeddings.patch_embeddings.projection.{*}", "network.backbone.patch_embed.proj.{*}"),
    (_ENCODER + "model.embeddings.norm.{*}", "network.backbone.patch_embed.norm.{*}"),
    (_BLOCK + "layernorm_before.{*}", _OUR_BLOCK + "norm1.{*}"),
    (_BLOCK + "layernorm_after.{*}", _OUR_BLOCK + "norm2.{*}"),
    (_BLOCK + "attention.self.{query,key,value}.{*}", _OUR_BLOCK + "attn.qkv.{*}"),
    (
        _BLOCK + "attention.self.relative_position_bias_table",
        _OUR_BLOCK + "attn.relative_position_bias_table",
    ),
    (_BLOCK + "attention.output.dense.{*}", _OUR_BLOCK + "attn.proj.{*}"),
    (_BLOCK + "intermediate.dense.{*}", _OUR_BLOCK + "mlp.fc1.{*}"),
    (_BLOCK + "output.dense.{*}", _OUR_BLOCK + "mlp.fc2.{*}"),
    (_ENCODER + "model.encoder.layers.{a}.downsample.{*}", "network.backbone.layers.{a}.downsample.{*}"),
    (_ENCODER + "hidden_states_norms.{a}.{*}", "network.backbone.norm{a}.{*}"),
    ("model.pixel_level_module.decoder.mask_projection.{*}", "network.pixel_decoder.embedding.{*}"),
    (_TRANSFORMER + "queries_embedder.{*}", "network.head.query_positions.{*}"),
    (_TRANSFORMER + "input_projection.{*}", "network.head.input_projection.{*}"),
    (_LAYER + "self_attn.{q_proj,k_proj,v_proj}.{*}", _OUR_LAYER + "self_attn.in_proj_{*}"),
    (_LAYER + "encoder_attn.{q_proj,k_proj,v_proj}.{*}", _OUR_LAYER + "cross_attn.in_proj_{*}"),
    (_LAYER + "self_attn.out_proj.{*}", _OUR_LAYER + "self_attn.out_proj.{*}"),
    (_LAYER + "encoder_attn.out_proj.{*}", _OUR_LAYER + "cross_attn.out_proj.{*}"),
    (_LAYER + "self_attn_layer_norm.{*}", _OUR_LAYER + "norm1.{*}"),
    (_LAYER + "encoder_attn_layer_norm.{*}", _OUR_LAYER + "norm2.{*}"),
    (_LAYER + "final_layer_norm.{*}", _OUR_LAYER + "norm3.{*}"),
    (_LAYER + "fc{b}.{*}", _OUR_LAYER + "linear{b}.{*}"),
    (_TRANSFORMER + "decoder.layernorm.{*}", "network.head.transformer.decoder.norm.{*}"),
    ("class_predictor.{*}", "network.head.class_head.{*}"),
    ("mask_embedder.{a}.0.{*}", "network.head.mask_head.layers.{a}.{*}"),
)
# A model whose backbone is timm's holds timm's own names; read, never written.
_TIMM = ((_ENCODER + "_backbone.{*}", "network.backbone.body.{*}"),)
# What some versions of transformers spell otherwise.
_SPELLINGS = (
    (re.compile(r"^(?=pixel_level_module\.|transformer_module\.)"), "model."),
    (re.compile(r"(?<=_attn)\.o_proj\."), ".out_proj."),
    (re.compile(r"(?<=\d)\.mlp\.fc(?=[12]\.)"), ".fc"),
)
_KINDS = (("proj", "lateral"), ("block", "output"))
_NORM_STAGE = re.compile(r"(.*\.hidden_states_norms\.)stage(\d+)(\..*)")


def join_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, with queries, keys and values stacked under names like ``self.{query,key,value}.bias``."""
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _PROJECTION.fullmatch(name)
        triple: tuple[str, ...] = next((each for each in _TRIPLES if match and match[2] in each), ())
        parts = [tensors.get(f"{match[1]}{part}.{match[3]}") for part in triple] if match else []
        found = [part for part in parts if part is not None and part.shape == tensor.shape]
        if match is None or len(found) < len(triple):
            joined[name] = tensor
        elif match[2] == triple[0]:
            joined[f"{match[1]}{{{','.join(triple)}}}.{match[3]}"] = torch.cat(found)
    return joined


def our_names(names: Collection[str]) -> dict[str, str]:
    """Name in a file, after `join_projections` → our name, or theirs in full where we have none."""
    full = {name: _usual_spelling(name) for name in names}
    rules = _rules(_levels(full.values(), _FPN + "layers."), backwards=False)
    return {name: translate(usual, rules) or usual for name, usual in full.items()}


def _usual_spelling(name: str) -> str:
    for pattern, text in _SPELLINGS:
        name = pattern.sub(text, name)
    stage = _NORM_STAGE.fullmatch(name)
    return f"{stage[1]}{int(stage[2]) - 1}{stage[3]}" if stage else name


def huggingface_state_dict(state: Mapping[str, Tensor], no_object_weight: float = 0.1) -> dict[str, Tensor]:
    """A model's weights under the names of `MaskFormerForInstanceSegmentation`, float32 on the CPU.

    What their files hold besides is added: counters of batch norms, Swin's index of relative positions, its last norm
    (which nothing reads) and the class weights of the criterion.

    Args:
        state: of a meta-architecture, names under ``network.``.
        no_object_weight: of the criterion.

    Raises:
        UserError: there is no name for something in this model.
    """
    own = {name: tensor for name, tensor in state.items() if name.startswith("network.") and not _is_counter(name)}
    rules = _rules(_levels(own, "network.pixel_decoder.lateral."), backwards=True)
    theirs: dict[str, Tensor] = {}
    for name, tensor in own.items():
        outside = translate(name, rules)
        if outside is None:
            raise UserError(f"Hugging Face's MaskFormer has no place for {name}: export with --to published instead")
        values = tensor.detach().cpu().float()
        if joined := _JOINED.fullmatch(outside):
            for part, chunk in zip(joined.groups()[1:4], values.chunk(3), strict=True):
                theirs[f"{joined[1]}{part}.{joined[5]}"] = chunk.clone()
        else:
            theirs[outside] = values.contiguous()
    return theirs | _calculated(theirs, no_object_weight)


def _calculated(theirs: Mapping[str, Tensor], no_object_weight: float) -> dict[str, Tensor]:
    extra: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if name.endswith(".running_mean"):
            extra[name.replace(".running_mean", ".num_batches_tracked")] = torch.tensor(0)
        if name.endswith(".relative_position_bias_table"):
            index = relative_position_index((math.isqrt(tensor.shape[0]) + 1) // 2)
            extra[name.replace("_bias_table", "_index")] = index
        if name == f"{_ENCODER}hidden_states_norms.3.weight":
            extra[f"{_ENCODER}model.layernorm.weight"] = torch.ones_like(tensor)
            extra[f"{_ENCODER}model.layernorm.bias"] = torch.zeros_like(tensor)
        if name == "class_predictor.bias":
            extra["criterion.empty_weight"] = torch.ones_like(tensor)
            extra["criterion.empty_weight"][-1] = no_object_weight
    return extra


def _is_counter(name: str) -> bool:
    return name.endswith(".num_batches_tracked")


def _levels(names: Iterable[str], start: str) -> int:
    """How many levels a pixel decoder has besides the coarsest."""
    return len({name.removeprefix(start).split(".")[0] for name in names if name.startswith(start)})


def _rules(levels: int, *, backwards: bool) -> Rules:
    pairs = list(_RULES)
    places = {f"layers.{i}.{kind}": f"{place}.{levels - 1 - i}" for i in range(levels) for kind, place in _KINDS}
    for theirs, ours in {**places, "stem": f"output.{levels}"}.items():
        pairs.append((f"{_FPN}{theirs}.0.{{*}}", f"network.pixel_decoder.{ours}.conv.{{*}}"))
        pairs.append((f"{_FPN}{theirs}.1.{{*}}", f"network.pixel_decoder.{ours}.norm.{{*}}"))
    return compile_rules((*pairs, *(() if backwards else _TIMM)), backwards=backwards)
