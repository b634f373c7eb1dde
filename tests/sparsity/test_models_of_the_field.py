"""What sparsify and probe do with the model classes of the field, built tiny: plugged, measured, or refused and why.

Each row: a name, how to build the model, a batch for it, and what is expected of `sparsify` with its defaults (and
`tokens=` where the model does not say how many there are).
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torchvision import models as vision

from sparsity.activations import JSReLU
from sparsity.blocks import features, find_blocks
from sparsity.plugins import sparsify
from sparsity.probes import probe

WIDTH, HIDDEN = 16, 32


@dataclass
class Row:
    """One class of the field."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], dict | tuple]
    blocks: int = 2
    options: dict = field(default_factory=dict)  # of sparsify
    refused: str = ""  # what the refusal with these options says; "" where the model is plugged
    measured: bool = True
    shared: bool = False  # the norm feeds attention too, and sparsify says so


def tokens(shape=(2, 6), vocabulary=23):
    return torch.randint(2, vocabulary, shape)


def transformers_model(name: str, **config):
    import transformers

    def build():
        kind = getattr(transformers, name)
        config_class = kind.config_class
        return kind(config_class(**config))

    return build


GATED = dict(activation=None)
SMALL = dict(vocab_size=23, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2)
NO_TOKENS = dict(pad_token_id=0, bos_token_id=0, eos_token_id=1)
IMAGE = dict(hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, image_size=12,
             patch_size=4)  # fmt: skip
BART = dict(vocab_size=23, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=HIDDEN,
            decoder_ffn_dim=HIDDEN, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=12,
            forced_eos_token_id=None, decoder_start_token_id=0, **NO_TOKENS)  # fmt: skip
EXPERTS = dict(moe_intermediate_size=HIDDEN, num_experts=4, num_experts_per_tok=2)


def ids():
    return {"input_ids": tokens()}


def both():
    return {"input_ids": tokens(), "decoder_input_ids": tokens((2, 5))}


def pixels():
    return {"pixel_values": torch.randn(2, 3, 12, 12)}


def image(size=12):
    return lambda: (torch.randn(2, 3, size, size),)


def text(kind, refused="", options=None, blocks=2, shared=False, **config):
    return Row(kind, transformers_model(kind, **(SMALL | NO_TOKENS | config)), ids, blocks, options or {}, refused,
               shared=shared)  # fmt: skip


def seen(kind, batch=pixels, refused="", options=None, blocks=2, **config):
    return Row(kind, transformers_model(kind, **(IMAGE | config)), batch, blocks, options or {}, refused)


def timm_model(kind, refused="", options=None, blocks=2, name=None, **arguments):
    def build():
        import timm

        return timm.create_model(kind, **arguments)

    return Row(f"timm {name or kind}", build, image(32), blocks, options or {}, refused)


TIMM = dict(img_size=32, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=2, mlp_ratio=2, num_classes=5)
CONVNEXT = dict(depths=(1,) * 4, dims=(WIDTH,) * 4)
SWIN = dict(embed_dim=WIDTH, depths=(2,), num_heads=(2,), mlp_ratio=2.0, num_classes=5)


def torch_layers(norm_first, activation):
    def build():
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, HIDDEN, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
        )
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    return build


def vectors():
    return (torch.randn(2, 6, WIDTH),)


CLASSES = [
    # text, pre-norm
    text("GPT2LMHeadModel", n_positions=16),
    text("GPTNeoForCausalLM", num_layers=2, num_heads=2, attention_types=[[["global"], 2]],
         max_position_embeddings=16),
    text("GPTNeoXForCausalLM", max_position_embeddings=16),
    text("GPTJForCausalLM", n_positions=16, n_embd=WIDTH, n_head=2, n_layer=2, n_inner=HIDDEN, rotary_dim=4,
         shared=True),
    text("CodeGenForCausalLM", n_positions=16, n_embd=WIDTH, n_head=4, n_layer=2, n_inner=HIDDEN, rotary_dim=2,
         shared=True),
    text("GPTBigCodeForCausalLM", n_positions=16, n_inner=HIDDEN),
    text("OPTForCausalLM", ffn_dim=HIDDEN, max_position_embeddings=16, word_embed_proj_dim=WIDTH),
    text("PhiForCausalLM", max_position_embeddings=16, shared=True),
    text("FalconForCausalLM", ffn_hidden_size=HIDDEN, max_position_embeddings=16, shared=True),
    text("BloomForCausalLM", options=dict(tokens=8)),
    text("Starcoder2ForCausalLM", max_position_embeddings=16, num_key_value_heads=2),
    text("PersimmonForCausalLM", max_position_embeddings=16),
    text("NemotronForCausalLM", max_position_embeddings=16, num_key_value_heads=2,
         refused="does not scale by its weight"),
    # text, post-norm
    text("BertForMaskedLM", max_position_embeddings=16),
    text("RobertaForMaskedLM", max_position_embeddings=16),
    text("ElectraForMaskedLM", max_position_embeddings=16, embedding_size=WIDTH),
    text("DistilBertForMaskedLM", dim=WIDTH, hidden_dim=HIDDEN, n_heads=2, n_layers=2, max_position_embeddings=16),
    text("AlbertForMaskedLM", blocks=1, embedding_size=WIDTH, max_position_embeddings=16),
    text("DebertaV2ForMaskedLM", max_position_embeddings=16),
    text("MPNetForMaskedLM", max_position_embeddings=16),
    text("ModernBertForMaskedLM", refused="is gated", max_position_embeddings=16, cls_token_id=0, sep_token_id=1),
    text("ModernBertForMaskedLM", options=GATED, max_position_embeddings=16, cls_token_id=0, sep_token_id=1),
    # text, gated
    text("LlamaForCausalLM", refused="is gated", max_position_embeddings=16),
    text("LlamaForCausalLM", options=GATED, max_position_embeddings=16),
    text("MistralForCausalLM", options=GATED, max_position_embeddings=16, num_key_value_heads=2),
    text("Qwen2ForCausalLM", options=GATED, max_position_embeddings=16, num_key_value_heads=2),
    text("Qwen3ForCausalLM", options=GATED, max_position_embeddings=16, num_key_value_heads=2, head_dim=8),
    text("Phi3ForCausalLM", options=GATED, max_position_embeddings=16, num_key_value_heads=2),
    text("CohereForCausalLM", options=GATED, max_position_embeddings=16, num_key_value_heads=2, shared=True),
    text("Gemma2ForCausalLM", options=GATED, max_position_embeddings=16, num_key_value_heads=2, head_dim=8,
         refused="does not scale by its weight"),
    text("Olmo2ForCausalLM", options=GATED, max_position_embeddings=16, refused="does not enter it"),
    # mixtures of experts
    text("MixtralForCausalLM", refused="no MLP block", num_key_value_heads=2, num_local_experts=4),
    text("Qwen2MoeForCausalLM", options=GATED, refused="layers.1: no MLP that a layout describes",
         num_key_value_heads=2, mlp_only_layers=[0], shared_expert_intermediate_size=HIDDEN, **EXPERTS),
    text("DeepseekV3ForCausalLM", options=GATED, refused="layers.1: no MLP that a layout describes",
         num_key_value_heads=2, first_k_dense_replace=1, n_routed_experts=4, n_group=2, topk_group=1,
         moe_intermediate_size=HIDDEN, num_experts_per_tok=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
         qk_nope_head_dim=4, v_head_dim=8),
    # encoder and decoder
    Row("T5ForConditionalGeneration", transformers_model(
        "T5ForConditionalGeneration", vocab_size=23, d_model=WIDTH, d_kv=8, d_ff=HIDDEN, num_layers=2, num_heads=2,
        decoder_start_token_id=0), both, 4),
    Row("T5 1.1", transformers_model(
        "T5ForConditionalGeneration", vocab_size=23, d_model=WIDTH, d_kv=8, d_ff=HIDDEN, num_layers=2, num_heads=2,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu"), both, 4, GATED),
    Row("BartForConditionalGeneration", transformers_model("BartForConditionalGeneration", **BART), both, 4),
    Row("MBartForConditionalGeneration", transformers_model("MBartForConditionalGeneration", **BART), both, 4),
    Row("PegasusForConditionalGeneration", transformers_model("PegasusForConditionalGeneration", **BART), both, 4),
    Row("MarianMTModel", transformers_model("MarianMTModel", **BART), both, 4),
    Row("WhisperForConditionalGeneration", transformers_model(
        "WhisperForConditionalGeneration", **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
        num_mel_bins=4, max_source_positions=8, max_target_positions=10),
        lambda: {"input_features": torch.randn(2, 4, 16), "decoder_input_ids": tokens((2, 5))}, 4),
    # speech
    Row("Wav2Vec2Model", transformers_model(
        "Wav2Vec2Model", hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2,
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, num_feat_extract_layers=2), lambda: {"input_values": torch.randn(2, 200)}, 2,
        dict(tokens=64)),
    # images, transformers
    seen("ViTModel"),
    seen("DeiTModel"),
    seen("BeitModel", options=dict(tokens=10)),
    seen("Dinov2Model", hidden_act="gelu", mlp_ratio=2),
    seen("CLIPVisionModel"),
    seen("SiglipVisionModel"),
    Row("ConvNextModel", transformers_model("ConvNextModel", hidden_sizes=[WIDTH] * 2, depths=[1, 1], num_stages=2),
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}, 2, dict(tokens=64)),
    Row("SwinModel", transformers_model("SwinModel", image_size=32, patch_size=4, embed_dim=WIDTH, depths=[2],
                                        num_heads=[2], window_size=4, mlp_ratio=2.0),
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}, 2, dict(tokens=64)),
    # timm
    timm_model("vit_tiny_patch16_224", **TIMM),
    timm_model("vit_base_patch16_siglip_224", name="SigLIP", **TIMM),
    timm_model("deit_tiny_patch16_224", **TIMM),
    timm_model("beit_base_patch16_224", **TIMM),
    timm_model("eva02_tiny_patch14_224", refused="is gated", **TIMM),
    timm_model("eva02_tiny_patch14_224", options=GATED, name="eva02, plugged", **TIMM),
    timm_model("eva02_tiny_patch14_224", options=GATED, name="eva02 after its norm", use_post_norm=True,
               refused="does not enter it", **TIMM),
    timm_model("vit_giant_patch14_dinov2", refused="is gated", **TIMM),
    timm_model("vit_giant_patch14_dinov2", options=GATED, name="dinov2 giant, plugged", **TIMM),
    timm_model("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=2, blocks=4),
    timm_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, patch_size=4, **SWIN),
    timm_model("swinv2_tiny_window8_256", img_size=32, window_size=4, patch_size=4,
               refused="does not enter it", **SWIN),
    timm_model("convnext_tiny", blocks=4, **CONVNEXT, options=dict(tokens=64)),
    timm_model("convnext_tiny", name="ConvNeXt of convolutions", blocks=4, **CONVNEXT, conv_mlp=True,
               refused="convolves maps", options=dict(tokens=64)),
    timm_model("convnext_tiny", name="ConvNeXt of convolutions, no bias", blocks=4, **CONVNEXT,
               conv_mlp=True, options=dict(zeroth_bias=False)),
    # torchvision, torch, open_clip
    Row("torchvision ViT", lambda: vision.VisionTransformer(12, 4, 2, 2, WIDTH, HIDDEN),
        image()),
    Row("torchvision Swin", lambda: vision.SwinTransformer([4, 4], WIDTH, [2], [2], [4, 4], 2.0),
        image(32), 2, dict(tokens=64)),
    Row("torchvision Swin V2", lambda: vision.swin_v2_t(), image(32), 12, dict(tokens=64),
        "does not enter it"),
    Row("torchvision ConvNeXt", lambda: vision.ConvNeXt(
        [vision.convnext.CNBlockConfig(WIDTH, None, 2)]), image(32), 2, dict(tokens=64)),
    Row("nn.TransformerEncoder", torch_layers(False, nn.ReLU()), vectors, options=dict(tokens=6)),
    Row("nn.TransformerEncoder, norm first", torch_layers(True, nn.functional.gelu), vectors, options=dict(tokens=6),
        measured=False),
    Row("nn.TransformerEncoder, functional", torch_layers(False, "relu"), vectors, options=dict(tokens=6),
        measured=False),
]  # fmt: skip
NAMES = [f"{index}-{row.name}" for index, row in enumerate(CLASSES)]


def run(model, row, batch):
    output = model(**batch) if isinstance(batch, dict) else model(*batch)
    if not isinstance(output, torch.Tensor):
        output = (
            output[0]
            if isinstance(output, tuple)
            else next(value for value in output.values() if isinstance(value, torch.Tensor) and value.requires_grad)
        )
    return output


def plugged(row):
    torch.manual_seed(0)
    model = row.build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sparsify(model, **row.options)
    return model, [str(warning.message) for warning in caught if "feeds attention too" in str(warning.message)]


@pytest.mark.parametrize("row", CLASSES, ids=NAMES)
def test_plugged_or_refused_and_untouched(row):
    torch.manual_seed(0)
    model = row.build()
    if row.refused:
        before, state = repr(model), copy.deepcopy(model.state_dict())
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        with pytest.raises(ValueError, match=row.refused):
            sparsify(model, **row.options)
        assert repr(model) == before and all(torch.equal(new, state[name]) for name, new in model.state_dict().items())
        assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        assert all("forward" not in vars(module) for module in model.modules())
        return
    model, said = plugged(row)
    assert bool(said) == row.shared
    blocks = find_blocks(model)
    assert len(blocks) == row.blocks
    for block in blocks:
        assert row.options.get("activation", 0) is None or isinstance(block.activation, JSReLU)
        assert (block.norm.weight >= 1).all()


@pytest.mark.parametrize("row", [row for row in CLASSES if not row.refused],
                         ids=[name for row, name in zip(CLASSES, NAMES, strict=True) if not row.refused])  # fmt: skip
def test_what_is_restricted_and_biased_is_what_the_mlp_receives(row):
    model, _ = plugged(row)
    batch, checked = row.batch(), []
    for block in find_blocks(model):

        def norm(module, inputs, output, block=block):
            block.layer._seen = output

        def key(module, inputs, output, block=block):
            bias = getattr(block.entrance, "zeroth_bias", None)
            expected = block.layer._seen
            if bias is not None:
                if block.trace.flattened:
                    expected = expected.view(2, -1, expected.shape[-1])
                rows = bias[: expected[0].numel() // expected.shape[-1]]
                expected = expected + rows.view(expected.shape[1:])
            if block.key is block.entrance:
                arrived, expected = output, nn.functional.linear(expected, module.weight, module.bias)
            else:
                arrived = inputs[0]
            torch.testing.assert_close(arrived.reshape(-1), expected.reshape(-1))
            checked.append(block.name)

        with torch.no_grad():
            if hasattr(block.entrance, "zeroth_bias"):
                block.entrance.zeroth_bias.normal_(std=0.1)
        block.norm.register_forward_hook(norm)
        block.key.register_forward_hook(key)
    output = run(model, row, batch)
    output.square().sum().backward()
    assert set(checked) == {block.name for block in find_blocks(model)}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for block in find_blocks(model):
        assert (block.norm.weight >= 1).all()
        bias = getattr(block.entrance, "zeroth_bias", None)
        if bias is not None:
            assert bias.grad is not None and (bias.abs() <= 0.1 * block.norm.weight.abs() + 1e-6).all()


EXPERTS_ONLY = ("no MLP block", "layers.1: no MLP that a layout describes")
MEASURED = [
    (row, name) for row, name in zip(CLASSES, NAMES, strict=True) if row.measured and row.refused not in EXPERTS_ONLY
]


@pytest.mark.parametrize("row", [row for row, _ in MEASURED], ids=[name for _, name in MEASURED])
def test_probes_see_every_unit_of_every_token(row):
    torch.manual_seed(0)
    model = row.build().eval()
    for parameter in model.parameters():
        if not parameter.any():  # heads, and norms at the end of a branch, may begin as zeros
            nn.init.normal_(parameter, std=0.1)
    for block in find_blocks(model):
        block.replace_activation(nn.ReLU())
    counts = {block.name: [] for block in find_blocks(model)}  # (entries, active ones) of each call
    for block in find_blocks(model):

        def count(module, inputs, output, block=block):
            counts[block.name].append((output.numel(), int((output.abs() > 1e-6).sum())))

        block.activation.register_forward_hook(count)
    with probe(model) as p:
        run(model, row, row.batch()).square().mean().backward()
    table = p.summary(gradients=True)
    for block in find_blocks(model):
        entries, active = map(sum, zip(*counts[block.name], strict=True))
        found, calls = table.loc[block.name], len(counts[block.name])
        assert found["samples"] == 2 * calls and found["units"] == features(block.value)[0]
        assert found["tokens"] * found["samples"] * found["units"] == pytest.approx(entries)
        assert found["density"] == pytest.approx(active / entries)
        assert found["density_from_flatness"] == pytest.approx(found["density"], rel=1e-4)
