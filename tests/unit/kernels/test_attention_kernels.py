"""The compiled kernels of attention against torch: rotation, pages, sinks, latents."""

from __future__ import annotations

import pytest
import torch
from kernel_values import INPUT_DTYPES, close
from torch import Tensor

from actors.kernels.native import NativeKernels, load_native

pytestmark = [
    pytest.mark.skipif(load_native() is None, reason="the compiled kernels were not built"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.mark.parametrize("width", [2, 16, 32, 64])
@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=str)
def test_rope_rotates_halves(native: NativeKernels, generator: torch.Generator, dtype: torch.dtype, width: int) -> None:
    x = torch.randn(1, 5, 3, width, generator=generator).to(dtype).transpose(1, 2)
    angles = torch.randn(1, 5, width // 2, generator=generator).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    y = native.rope(x, cos, sin)

    rotated = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), dim=-1)
    close(y, x * cos[:, None] + rotated * sin[:, None], dtype)


@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=str)
def test_append_kv_writes_the_named_slots(
    native: NativeKernels, generator: torch.Generator, dtype: torch.dtype
) -> None:
    key, value = (torch.randn(1, 3, 2, 20, generator=generator).to(dtype).transpose(1, 2) for _ in range(2))
    slots = torch.tensor([9, 0, 4])
    k_cache, v_cache = torch.zeros(10, 2, 20, dtype=dtype), torch.zeros(10, 2, 20, dtype=dtype)

    native.append_kv(key, value, slots, k_cache, v_cache)

    assert torch.equal(k_cache[slots], key[0].transpose(0, 1))
    assert torch.equal(v_cache[slots], value[0].transpose(0, 1))
    assert not k_cache[[1, 2, 3, 5, 6, 7, 8]].any()


def _paged(generator: torch.Generator, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, ...]:
    caches = [torch.randn(80, kv_heads, dim, generator=generator).to(dtype) for _ in range(2)]
    lengths = torch.tensor([1, 2, 15, 16, 17, 40])
    slots = torch.cat([torch.randperm(80, generator=generator)[:n] for n in lengths.tolist()])
    ends = torch.cumsum(lengths, 0)
    query = torch.randn(len(lengths), heads, dim, generator=generator).to(dtype)
    return query, *caches, slots, ends - lengths, ends


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (6, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("dim", [8, 16, 20, 64])
@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=str)
def test_paged_attention_equals_torch_and_rows_are_independent(
    native: NativeKernels, generator: torch.Generator, dtype: torch.dtype, dim: int, heads: tuple[int, int]
) -> None:
    query, keys, values, slots, starts, ends = _paged(generator, dtype, *heads, dim)

    out = native.paged_attention(query, keys, values, slots, starts, ends, 0.3)

    for row in range(len(query)):
        seen = slots[starts[row] : ends[row]]
        k, v = (cache[seen].float().repeat_interleave(heads[0] // heads[1], dim=1) for cache in (keys, values))
        scores = torch.einsum("hc,shc->hs", query[row].float(), k) * 0.3
        close(out[row], torch.einsum("hs,shc->hc", torch.softmax(scores, dim=-1), v), dtype)
        one = slice(row, row + 1)
        alone = native.paged_attention(query[one], keys, values, slots, starts[one], ends[one], 0.3)
        assert torch.equal(alone, out[one])


def test_paged_attention_survives_large_scores(native: NativeKernels) -> None:
    keys, values = torch.zeros(3, 1, 16), torch.arange(48.0).view(3, 1, 16)
    keys[:, 0, 0] = torch.tensor([-500.0, 300.0, 299.0])
    query = torch.zeros(1, 1, 16)
    query[0, 0, 0] = 10.0

    out = native.paged_attention(query, keys, values, torch.arange(3), torch.tensor([0]), torch.tensor([3]), 1.0)

    close(out[0], torch.softmax(torch.tensor([-5000.0, 3000.0, 2990.0]), 0) @ values[:, 0] + torch.zeros(1, 16))


def test_append_kv_of_latents_writes_both_widths(native: NativeKernels, generator: torch.Generator) -> None:
    latent, rope = torch.randn(1, 1, 3, 20, generator=generator), torch.randn(1, 3, 1, 6, generator=generator)
    slots = torch.tensor([4, 1, 2])
    latents, ropes = torch.zeros(5, 1, 20), torch.zeros(5, 1, 6)

    native.append_kv(latent, rope.transpose(1, 2), slots, latents, ropes)

    assert torch.equal(latents[slots], latent[0].transpose(0, 1))
    assert torch.equal(ropes[slots], rope[0])
    assert not latents[[0, 3]].any()
    assert not ropes[[0, 3]].any()


@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=str)
def test_paged_attention_with_sinks_and_narrower_values_equals_torch(
    native: NativeKernels, generator: torch.Generator, dtype: torch.dtype
) -> None:
    query, keys, _, slots, starts, ends = _paged(generator, dtype, 4, 2, 20)
    values = torch.randn(80, 2, 12, generator=generator).to(dtype)
    sinks = torch.tensor([-50.0, 0.0, 2.0, 50.0])

    out = native.paged_attention(query, keys, values, slots, starts, ends, 0.3, sinks)

    assert out.shape == (len(query), 4, 12)
    for row in range(len(query)):
        seen = slots[starts[row] : ends[row]]
        k, v = (cache[seen].float().repeat_interleave(2, dim=1) for cache in (keys, values))
        scores = torch.einsum("hc,shc->hs", query[row].float(), k) * 0.3
        shares = torch.softmax(torch.cat((scores, sinks[:, None]), dim=-1), dim=-1)[:, :-1]
        close(out[row], torch.einsum("hs,shc->hc", shares, v), dtype)


@pytest.mark.parametrize("dims", [(20, 16, 28, 24), (16, 8, 16, 32), (5, 2, 3, 7)], ids=str)
@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=str)
def test_latent_attention_equals_attention_over_expanded_latents(
    native: NativeKernels, generator: torch.Generator, dtype: torch.dtype, dims: tuple[int, int, int, int]
) -> None:
    N, P, V, L = dims
    query, _, _, slots, starts, ends = _paged(generator, dtype, 3, 1, N + P)
    latents = torch.randn(80, 1, L, generator=generator).to(dtype)
    ropes = torch.randn(80, 1, P, generator=generator).to(dtype)
    up = (torch.randn(3, N + V, L, generator=generator) / L**0.5).to(dtype)

    out = native.latent_attention(query, latents, ropes, up, slots, starts, ends, 0.3)

    for row in range(len(query)):
        seen = slots[starts[row] : ends[row]]
        expanded = torch.einsum("sl,hcl->shc", latents[seen, 0].float(), up.float())
        keys = torch.cat((expanded[..., :N], ropes[seen].float().expand(-1, 3, -1)), dim=-1)
        scores = torch.einsum("hc,shc->hs", query[row].float(), keys) * 0.3
        close(out[row], torch.einsum("hs,shv->hv", torch.softmax(scores, dim=-1), expanded[..., N:]), dtype)
        one = slice(row, row + 1)
        assert torch.equal(
            native.latent_attention(query[one], latents, ropes, up, slots, starts[one], ends[one], 0.3), out[one]
        )
