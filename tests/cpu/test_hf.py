"""Transformers models with our attention against the same models with eager attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import (
    BertModel,
    DeepseekV3ForCausalLM,
    DynamicCache,
    Gemma2ForCausalLM,
    Gemma3TextModel,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertModel,
    Qwen2ForCausalLM,
    Qwen2MoeForCausalLM,
    StaticCache,
)
from transformers.masking_utils import create_causal_mask

from cute_fmha.adapters import hf

VOCAB, WINDOW = 64, 8

# Random weights this large make attention peaked, so that a mask that is off by one key shows.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
GQA: dict[str, Any] = {**COMMON, "num_key_value_heads": 2, "head_dim": 64}
QWEN: dict[str, Any] = {
    **COMMON,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "layer_types": ["full_attention", "sliding_attention"],
}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip

MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, GQA),
    "deepseek": (
        DeepseekV3ForCausalLM,
        {
            **COMMON, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 64,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "rope_parameters": YARN,
        },
    ),
    "mistral": (MistralForCausalLM, {**GQA, "sliding_window": WINDOW}),
    "qwen2": (Qwen2ForCausalLM, QWEN),
    # Leaves the window to the mask: its attention passes no `sliding_window`.
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        {
            **QWEN, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
            "num_experts": 4, "num_experts_per_tok": 2,
        },
    ),
    "gemma2": (
        Gemma2ForCausalLM,
        {
            **GQA, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 64,
        },
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        {
            **GQA, "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2,
            "max_position_embeddings": 128, "rope_parameters": {"rope_type": "default",
            "rope_theta": 10000.0},
        },
    ),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    hf.register(backend="reference")
    with torch.inference_mode():
        yield


def _build(cls: Any, settings: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(0)
    model = cls(cls.config_class(**settings, **more)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2.0)
    return model


def _model(name: str) -> Any:
    return _build(*MODELS[name])


def _ids(batch: int = 2, length: int = 21) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def _both(model: Any, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager and our output for the same input."""
    outputs = []
    for implementation in ("eager", hf.NAME):
        model.set_attn_implementation(implementation)
        outputs.append(model(**inputs)[0])
    return outputs[0], outputs[1]


def _assert_same(want: torch.Tensor, got: torch.Tensor) -> None:
    """Equal up to FP32 rounding through two layers, relative to the size of the logits."""
    assert float(want.std()) > 0.05, "the model's output is too flat to tell anything"
    torch.testing.assert_close(got, want, rtol=0, atol=5e-5 * max(1.0, float(want.abs().max())))


LEFT, RIGHT, HOLES, FULL = "left", "right", "holes", "full"


def _padding(kind: str, batch: int = 2, length: int = 21) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    if kind == LEFT:
        mask[0, :6] = 0
    elif kind == RIGHT:
        mask[0, -6:] = 0
    elif kind == HOLES:
        mask[0, 5:9] = 0
        mask[1, :2] = 0
        mask[1, -3:] = 0
    return mask


@pytest.mark.parametrize("name", MODELS)
def test_prefill(name: str) -> None:
    _assert_same(*_both(_model(name), input_ids=_ids(), use_cache=False))


@pytest.mark.parametrize("kind", [LEFT, RIGHT, FULL])
@pytest.mark.parametrize("name", MODELS)
def test_padded_prefill(name: str, kind: str) -> None:
    mask = _padding(kind)
    want, got = _both(_model(name), input_ids=_ids(), attention_mask=mask)
    _assert_same(want[mask.bool()], got[mask.bool()])


@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_padding_between_tokens(name: str) -> None:
    mask = _padding(HOLES)
    want, got = _both(_model(name), input_ids=_ids(), attention_mask=mask)
    _assert_same(want[mask.bool()], got[mask.bool()])


CHUNKS = (7, 6, 1, 1, 1)
CACHE_LENGTH = 24


def _stepwise(
    model: Any, implementation: str, padding: torch.Tensor | None, cache: str, whole: bool = False
) -> torch.Tensor:
    """Logits of a prefill in two chunks and of single tokens after it.

    ``whole`` passes all of ``padding`` in each step, not only the part up to the step's last token.
    """
    model.set_attn_implementation(implementation)
    past: Any = (
        DynamicCache(config=model.config)
        if cache == "dynamic"
        else StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)
    )
    ids, logits, start = _ids(length=sum(CHUNKS)), [], 0
    for chunk in CHUNKS:
        end = start + chunk
        mask = padding if padding is None or whole else padding[:, :end]
        out = model(
            ids[:, start:end],
            attention_mask=mask,
            past_key_values=past,
            position_ids=torch.arange(start, end)[None].expand(2, -1),
        )
        logits.append(out.logits)
        start = end
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", [None, FULL, LEFT])
@pytest.mark.parametrize("name", MODELS)
def test_cached_decode(name: str, kind: str | None, cache: str) -> None:
    """The last tokens are past the window, and short of the end of the static cache."""
    model = _model(name)
    padding = None if kind is None else _padding(kind, length=sum(CHUNKS))
    want, got = (_stepwise(model, how, padding, cache) for how in ("eager", hf.NAME))
    valid = _padding(kind or FULL, length=sum(CHUNKS)).bool()
    _assert_same(want[valid], got[valid])


@pytest.mark.parametrize("kind", [FULL, LEFT])
def test_mask_as_long_as_the_static_cache(kind: str) -> None:
    """True for slots that no token has reached yet."""
    model, padding = _model("llama"), _padding(kind, length=CACHE_LENGTH)
    want, got = (_stepwise(model, how, padding, "static", True) for how in ("eager", hf.NAME))
    valid = padding[:, : sum(CHUNKS)].bool()
    _assert_same(want[valid], got[valid])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padding_between_tokens_of_a_later_chunk(cache: str) -> None:
    model, padding = _model("llama"), _padding(LEFT, length=sum(CHUNKS))
    padding[1, 9:11] = 0
    want, got = (_stepwise(model, how, padding, cache) for how in ("eager", hf.NAME))
    _assert_same(want[padding.bool()], got[padding.bool()])


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(cache: str | None) -> None:
    model, ids, mask = _model("llama"), _ids(), _padding(LEFT)
    tokens = []
    for implementation in ("eager", hf.NAME):
        model.set_attn_implementation(implementation)
        tokens.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None,
                cache_implementation=cache, disable_compile=True,
            )
        )  # fmt: skip
    assert tokens[0].shape == (2, 27)
    assert torch.equal(tokens[0], tokens[1])


LENGTHS = (9, 1, 11)


def _packed_positions() -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in LENGTHS])[None]


@pytest.mark.parametrize("name", ["llama", "deepseek", "mistral", "gpt_oss"])
def test_packed_by_position_ids(name: str) -> None:
    inputs = {"input_ids": _ids(1), "position_ids": _packed_positions(), "use_cache": False}
    want, got = _both(_model(name), **inputs)
    _assert_same(want, got)


def test_packed_plan_bounds_the_longest_sequence() -> None:
    """The kernels size their grid by it."""
    model = _model("llama")
    model.set_attn_implementation(hf.NAME)
    plan = create_causal_mask(
        model.config, torch.zeros(1, 21, 128), None, None, position_ids=_packed_positions()
    )
    assert isinstance(plan, torch.Tensor)
    assert plan.shape == (1, 1, max(LENGTHS), 4)
    assert plan[0, 0, 0].tolist() == [0, 9, 10, 21]


def test_packed_rows_of_a_batch() -> None:
    positions = torch.cat([_packed_positions(), torch.arange(21)[None]])
    _assert_same(*_both(_model("llama"), input_ids=_ids(), position_ids=positions, use_cache=False))


@pytest.mark.parametrize("name", ["llama", "deepseek", "mistral"])
def test_packed_by_cu_seq_lens(name: str) -> None:
    """Each packed sequence gets the logits that it has alone."""
    model, ids = _model(name), _ids(1)
    boundaries = torch.tensor([0, 9, 10, 21], dtype=torch.int32)
    model.set_attn_implementation(hf.NAME)
    got = model(
        ids, position_ids=_packed_positions(), cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries,
        max_length_q=11, max_length_k=11,
    ).logits  # fmt: skip
    model.set_attn_implementation("eager")
    want = torch.cat([model(part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
    _assert_same(want, got)


@pytest.mark.parametrize("kind", [FULL, LEFT, RIGHT, HOLES])
def test_bidirectional_encoder(kind: str) -> None:
    model = _build(BertModel, {**COMMON, "num_attention_heads": 2})
    mask = _padding(kind)
    want, got = _both(model, input_ids=_ids(), attention_mask=mask)
    _assert_same(want[mask.bool()], got[mask.bool()])


@pytest.mark.parametrize("kind", [FULL, LEFT, RIGHT])
def test_bidirectional_window(kind: str) -> None:
    settings = {**COMMON, "num_attention_heads": 2, "local_attention": WINDOW, "vocab_size": VOCAB}
    settings["layer_types"] = ["full_attention", "sliding_attention"]
    model = _build(ModernBertModel, settings)
    mask = _padding(kind)
    want, got = _both(model, input_ids=_ids(), attention_mask=mask)
    _assert_same(want[mask.bool()], got[mask.bool()])


def test_decoder_made_bidirectional() -> None:
    want, got = _both(_model("llama"), input_ids=_ids(), is_causal=False, use_cache=False)
    _assert_same(want, got)
    causal = _both(_model("llama"), input_ids=_ids(), use_cache=False)[0]
    assert (want - causal).abs().max() > 0.1


@pytest.fixture
def _no_inference_mode() -> Iterator[None]:
    """torch.compile traces with gradients off, not in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@pytest.mark.usefixtures("_no_inference_mode")
class TestCompile:
    """`torch.compile(fullgraph=True)`; the "eager" backend traces and runs, without codegen."""

    def _compiled(self, model: Any) -> Any:
        torch._dynamo.reset()
        return torch.compile(model, fullgraph=True, backend="eager")

    @pytest.mark.parametrize("name", ["llama", "deepseek", "mistral"])
    def test_without_mask(self, name: str) -> None:
        model, ids = _model(name), _ids()
        want, _ = _both(model, input_ids=ids, use_cache=False)
        _assert_same(want, self._compiled(model)(ids, use_cache=False).logits)

    def test_with_padding(self) -> None:
        model, ids, mask = _model("llama"), _ids(), _padding(LEFT)
        want, _ = _both(model, input_ids=ids, attention_mask=mask, use_cache=False)
        got = self._compiled(model)(ids, attention_mask=mask, use_cache=False).logits
        _assert_same(want[mask.bool()], got[mask.bool()])

    def test_static_cache(self) -> None:
        model, ids = _model("llama"), _ids()
        want, _ = _both(model, input_ids=ids, use_cache=False)
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(ids[:, :-1], past_key_values=cache)
        got = self._compiled(model)(ids[:, -1:], past_key_values=cache).logits
        _assert_same(want[:, -1:], got)

    def test_packed_positions_are_not_missed(self) -> None:
        model = _model("llama")
        _both(model, input_ids=_ids(1), use_cache=False)
        with pytest.raises(RuntimeError, match="pass cu_seq_lens_q"):
            self._compiled(model)(_ids(1), position_ids=_packed_positions(), use_cache=False)


class TestRefused:
    def _ours(self, name: str = "llama") -> Any:
        model = _model(name)
        model.set_attn_implementation(hf.NAME)
        return model

    def test_four_dimensional_mask(self) -> None:
        mask = torch.zeros(2, 1, 21, 21).masked_fill(torch.rand(21, 21) > 0.5, -1e9)
        with pytest.raises(NotImplementedError, match=r"torch\.float32 \(2, 1, 21, 21\)"):
            self._ours()(_ids(), attention_mask=mask)
        with pytest.raises(NotImplementedError, match=r"torch\.bool \(2, 1, 21, 21\)"):
            self._ours()(_ids(), attention_mask=mask == 0)
        with pytest.raises(NotImplementedError, match=r"torch\.int64 \(2, 1, 1, 21\)"):
            self._ours()(_ids(), attention_mask=torch.ones(2, 1, 1, 21, dtype=torch.long))

    @pytest.mark.parametrize("queries", [1, 21])
    def test_integer_mask_is_not_taken_for_a_plan(self, queries: int) -> None:
        mask = torch.ones(1, 1, queries, 21, dtype=torch.int32)
        with pytest.raises(NotImplementedError, match=r"torch\.int32 \(1, 1"):
            self._ours()(_ids(1), attention_mask=mask)

    def test_output_attentions(self) -> None:
        with pytest.raises(NotImplementedError, match="output_attentions"):
            self._ours()(_ids(), output_attentions=True)

    def test_dropout(self) -> None:
        model = _build(LlamaForCausalLM, GQA, attention_dropout=0.1).train()
        model.set_attn_implementation(hf.NAME)
        with pytest.raises(NotImplementedError, match=r"dropout: got 0\.1"):
            model(_ids())

    def test_gradients(self) -> None:
        with torch.inference_mode(False), pytest.raises(NotImplementedError, match="backward"):
            self._ours()(_ids())

    def test_mask_functions_of_the_model(self) -> None:
        """Gemma3's bidirectional mode adds its own function to the mask."""
        model = _build(Gemma3TextModel, {**GQA, "use_bidirectional_attention": True})
        model.set_attn_implementation(hf.NAME)
        with pytest.raises(NotImplementedError, match="mask pattern"):
            model(_ids())

    def test_chunked_attention_past_one_chunk(self) -> None:
        settings = {
            **GQA, "attention_chunk_size": 16, "intermediate_size_mlp": 64, "num_local_experts": 2,
            "num_experts_per_tok": 1,
        }  # fmt: skip
        model = _build(Llama4ForCausalLM, settings)
        want, got = _both(model, input_ids=_ids(length=16), use_cache=False)
        _assert_same(want, got)
        with pytest.raises(NotImplementedError, match="chunked_overlay"):
            model(_ids(length=17), use_cache=False)

    def test_window_that_nobody_passes(self) -> None:
        class Attention(torch.nn.Module):
            config = MistralConfig(sliding_window=WINDOW)

        q = torch.randn(1, 2, 21, 64)
        with pytest.raises(NotImplementedError, match="sliding window of 8"):
            hf.attention_forward(Attention(), q, q, q, None)

    def test_paged_cache_and_incomplete_packing(self) -> None:
        q = torch.randn(1, 2, 21, 64)
        module = torch.nn.Module()
        with pytest.raises(NotImplementedError, match="block_table"):
            hf.attention_forward(module, q, q, q, None, block_table=torch.zeros(1))
        with pytest.raises(ValueError, match="max_length_q"):
            hf.attention_forward(module, q, q, q, None, cu_seq_lens_q=torch.tensor([0, 21]))

    def test_head_dim(self) -> None:
        model = _build(LlamaForCausalLM, {**GQA, "head_dim": 32})
        model.set_attn_implementation(hf.NAME)
        with pytest.raises(ValueError, match=r"head dims \(D, Dv\): got \(32, 32\)"):
            model(_ids())
