"""The exportable effective rank against the eigenvalue decomposition, and the attention entropy against its formula."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from leanvlm.calibration.rank_fit import fit_rank
from leanvlm.exporter.pruners.gates import attention_entropy, effective_rank, exact_effective_rank
from leanvlm.exporter.pruners.rank_coefficients import RANK_COEFFICIENTS
from leanvlm.exporter.trace import trace

Draw = Callable[[np.random.Generator, int, int], NDArray[np.float64]]


def with_singular_values(rng: np.random.Generator, tokens: int, width: int, values: NDArray[np.float64]) -> NDArray[np.float64]:
    left = np.linalg.qr(rng.standard_normal((tokens, len(values))))[0]
    right = np.linalg.qr(rng.standard_normal((width, len(values))))[0]
    return np.asarray(left * values @ right.T)


def gaussian(rng: np.random.Generator, tokens: int, width: int) -> NDArray[np.float64]:
    return rng.standard_normal((tokens, width))


def power(rng: np.random.Generator, tokens: int, width: int) -> NDArray[np.float64]:
    index = np.arange(1.0, min(tokens, width) + 1)
    return with_singular_values(rng, tokens, width, index ** -rng.uniform(0.5, 1.5))


def exponential(rng: np.random.Generator, tokens: int, width: int) -> NDArray[np.float64]:
    index = np.arange(1.0, min(tokens, width) + 1)
    return with_singular_values(rng, tokens, width, np.exp(-index / np.exp(rng.uniform(np.log(3), np.log(len(index))))))


def clustered(rng: np.random.Generator, tokens: int, width: int) -> NDArray[np.float64]:
    clusters = int(np.exp(rng.uniform(np.log(4), np.log(tokens / 2))))
    features = rng.standard_normal((clusters, width))[rng.integers(0, clusters, tokens)]
    features += rng.choice([0, 0.03, 0.3]) * rng.standard_normal((tokens, width))
    features[rng.integers(0, tokens, tokens // 5)] = features[0]
    return np.asarray(features)


# Mean and worst relative error, with room for other draws.
@pytest.mark.parametrize(
    ("draw", "mean", "worst"),
    [(gaussian, 0.01, 0.02), (power, 0.01, 0.03), (exponential, 0.012, 0.05), (clustered, 0.02, 0.08)],
)
def test_close_to_the_decomposition(draw: Draw, mean: float, worst: float) -> None:
    rng = np.random.default_rng(11)
    errors = []
    for _ in range(4):
        for tokens, width in ((144, 512), (576, 256), (576, 1024), (729, 1152)):
            features = torch.from_numpy(draw(rng, tokens, width)[None]).float()
            errors.append((effective_rank(features).double() / exact_effective_rank(features) - 1).abs().item())
    assert np.mean(errors) < mean
    assert max(errors) < worst


def test_the_reference_matches_the_singular_values() -> None:
    features = power(np.random.default_rng(0), 60, 40)
    values = np.linalg.svd(features - features.mean(0), compute_uv=False)
    share = values / values.sum()
    expected = np.exp(-(share * np.log(share)).sum())
    assert exact_effective_rank(torch.from_numpy(features[None])).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_scale_and_offset_do_not_matter(scale: float, offset: float) -> None:
    features = torch.from_numpy(power(np.random.default_rng(1), 144, 256)[None]).float()
    moved = (features + offset * features.std()) * scale
    torch.testing.assert_close(effective_rank(moved), effective_rank(features), rtol=1e-3, atol=0)


def test_rows_are_independent() -> None:
    rng = np.random.default_rng(2)
    rows = [torch.from_numpy(draw(rng, 96, 128)).float() for draw in (gaussian, power, exponential)]
    together = effective_rank(torch.stack([*rows, torch.full((96, 128), float("inf"))]))
    torch.testing.assert_close(together[:3], torch.cat([effective_rank(row[None]) for row in rows]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_equal_tokens_have_rank_one(value: float) -> None:
    features = torch.full((2, 576, 64), value)
    assert effective_rank(features).tolist() == [1.0, 1.0]
    assert exact_effective_rank(features).tolist() == [1.0, 1.0]


def test_unusual_spectra_stay_in_range() -> None:
    one_direction = torch.outer(torch.linspace(-1, 1, 64), torch.ones(32))
    orthogonal = torch.eye(64)[:, :32] * 5
    one_outlier = torch.zeros(64, 32).index_fill(0, torch.tensor([3]), 1.0)
    ranks = effective_rank(torch.stack([one_direction, orthogonal, one_outlier]))
    assert ranks.isfinite().all()
    assert ranks.min() >= 1
    assert ranks.max() <= 32


def test_half_precision_input_is_computed_in_single() -> None:
    features = torch.from_numpy(power(np.random.default_rng(3), 144, 256)[None]).half()
    torch.testing.assert_close(effective_rank(features), effective_rank(features.float()), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_exported_graph_matches(shape: tuple[int, int], tmp_path: Path) -> None:
    class Gates(torch.nn.Module):
        def forward(self, features: torch.Tensor, attention: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return effective_rank(features), attention_entropy(attention)

    generator = torch.Generator().manual_seed(4)
    features = torch.randn(3, *shape, generator=generator) * torch.linspace(0.01, 1, shape[1])
    attention = torch.rand(3, shape[0], generator=generator)
    given = {"features": features[:2], "attention": attention[:2]}
    model = trace(Gates().eval(), given, output_names=["rank", "entropy"], opset=18)
    assert {node.domain for node in model.graph} <= {"", "ai.onnx"}
    ir.save(model, tmp_path / "gates.onnx")
    session = ort.InferenceSession(tmp_path / "gates.onnx", providers=["CPUExecutionProvider"])
    for rows in (1, 2, 3):  # 3 was not traced
        rank, entropy = session.run(None, {"features": features[:rows].numpy(), "attention": attention[:rows].numpy()})
        # Another order of summation; nine lifts multiply a rounding error of 1e-7 by up to 1e3.
        np.testing.assert_allclose(rank, effective_rank(features[:rows]).numpy(), rtol=1e-3)
        np.testing.assert_allclose(entropy, attention_entropy(attention[:rows]).numpy(), rtol=1e-6)


def test_the_constants_are_those_of_the_fit() -> None:
    fitted = fit_rank()
    assert fitted.lifts == RANK_COEFFICIENTS.lifts
    np.testing.assert_allclose(fitted.root, RANK_COEFFICIENTS.root, rtol=1e-4)
    np.testing.assert_allclose(fitted.entropy, RANK_COEFFICIENTS.entropy, rtol=1e-4)


def test_entropy_is_natural_and_ignores_scale() -> None:
    attention = torch.tensor([[1.0, 1, 1, 1], [2, 0, 0, 0], [0.1, 0.2, 0.3, 0.4]])
    share = np.array([0.1, 0.2, 0.3, 0.4])
    expected = torch.tensor([np.log(4), 0.0, -(share * np.log(share)).sum()], dtype=torch.float32)
    torch.testing.assert_close(attention_entropy(attention), expected)
    torch.testing.assert_close(attention_entropy(7 * attention), expected)
