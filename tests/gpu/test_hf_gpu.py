"""Transformers models on a GPU: BF16 against eager attention, CUDA graphs, launches, no syncs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from cute_fmha import demo
from cute_fmha.adapters import hf

pytestmark = pytest.mark.gpu

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
GQA: dict[str, Any] = {**COMMON, "num_key_value_heads": 2, "head_dim": 64}


def _config(name: str) -> tuple[Any, Any]:
    if name == "llama":
        return LlamaForCausalLM, LlamaConfig(**GQA)
    if name == "mistral":
        return MistralForCausalLM, MistralConfig(**GQA, sliding_window=100)
    # Dense layers only: an expert that changes with rounding would hide what is compared here.
    return DeepseekV3ForCausalLM, DeepseekV3Config(
        **COMMON, num_key_value_heads=8, q_lora_rank=64, kv_lora_rank=128, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=2,
    )  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    hf.register(backend="triton")
    with torch.no_grad():
        yield


def _model(name: str) -> Any:
    cls, config = _config(name)
    torch.manual_seed(0)
    return cls(config).eval().cuda().bfloat16()


def _ids(batch: int = 2, length: int = 260) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 128, (batch, length), generator=generator).cuda()


def _logits(model: Any, implementation: str, inputs: dict[str, Any], decode: int) -> torch.Tensor:
    """Logits of a prefill and of ``decode`` single-token steps after it, in FP32."""
    model.set_attn_implementation(implementation)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache, prefill = DynamicCache(config=model.config), inputs["input_ids"].shape[1] - decode
    logits, start = [], 0
    for end in range(prefill, ids.shape[1] + 1):
        out = model(
            ids[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            past_key_values=cache,
            position_ids=torch.arange(start, end, device="cuda")[None].expand(len(ids), -1),
        )
        logits.append(out.logits.float())
        start = end
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("padded", [None, "left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "deepseek"])
def test_as_close_to_fp32_as_eager(name: str, padded: str | None) -> None:
    """Ours may not be further from the FP32 model than eager attention in BF16 is."""
    model, ids, mask, decode = _model(name), _ids(), None, 4
    if padded is not None:
        mask = torch.ones_like(ids)
        if padded == "left":
            mask[0, :77] = 0
        else:
            mask[0, -77:] = 0
            decode = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    exact = _logits(copy.deepcopy(model).float(), "eager", inputs, decode)
    eager, ours = (_logits(model, how, inputs, decode) for how in ("eager", hf.NAME))
    valid = torch.ones_like(ids).bool() if mask is None else mask.bool()
    theirs, mine = ((x - exact)[valid].square().mean().sqrt().item() for x in (eager, ours))
    assert exact.std() > 0.1
    assert mine <= 1.1 * theirs


def test_no_synchronisation_without_mask() -> None:
    model, ids = _model("llama"), _ids(1, 40)
    model.set_attn_implementation(hf.NAME)
    for attempt in range(2):
        cache = DynamicCache(config=model.config)
        if attempt == 1:  # the first one compiled the kernels
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            model(ids[:, :-1], past_key_values=cache)
            model(ids[:, -1:], past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_of_a_decode_step() -> None:
    """One captured step with a static cache, replayed while the cache grows."""
    model, ids = _model("llama"), _ids(2, 40)
    model.set_attn_implementation(hf.NAME)
    want = model(ids).logits.float()
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(ids[:, :32], past_key_values=cache)
    token = ids[:, 32:33].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles; the tokens it takes are real steps
        for step in (32, 33):
            token.copy_(ids[:, step : step + 1])
            model(token, past_key_values=cache)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(token, past_key_values=cache).logits
    for step in range(34, 40):
        token.copy_(ids[:, step : step + 1])
        graph.replay()
        torch.testing.assert_close(logits[:, 0].float(), want[:, step], atol=0.1, rtol=0.05)


def test_inductor_fullgraph() -> None:
    model, ids = _model("llama"), _ids(1, 64)
    model.set_attn_implementation(hf.NAME)
    want = model(ids, use_cache=False).logits.float()
    torch._dynamo.reset()
    got = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits.float()
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.05)


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    code = demo.main(["--device", "cuda", "--backend", "triton", "--prefill", "512"])
    text = capsys.readouterr().out
    assert code == 0, text
    one_each = "3 op calls, 1 per layer; 3 kernel launches, 1 per layer; 0 synchronisations"
    assert f"prefill: {one_each}" in text
    assert f"decode step: {one_each}" in text
