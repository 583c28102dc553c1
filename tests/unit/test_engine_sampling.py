"""Choosing tokens: greedy, sampled, top-p, all in one batch."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from agentkd.engine.sampling import choose  # noqa: E402


@pytest.mark.parametrize("size", [7, 256, 1000, 5000])
def test_a_draw_falls_where_the_cumulated_distribution_says(size: int) -> None:
    torch.manual_seed(size)
    logits = torch.randn(9, size) * 3
    cumulated = torch.softmax(logits.double() / 0.7, -1).cumsum(-1)
    for draw in (0.0, 0.01, 0.3, 0.5, 0.77, 0.999, 1 - 1e-9):
        found = choose(logits, [0.7] * 9, [1.0] * 9, [draw] * 9).ids
        for row, token in enumerate(found):
            low = float(cumulated[row, token - 1]) if token else 0.0
            assert low - 1e-5 <= draw <= float(cumulated[row, token]) + 1e-5


def test_no_impossible_token_is_drawn() -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, 300] = logits[0, 511] = 0.0
    for draw in (0.0, 0.49, 0.51, 1 - 2**-53):
        assert choose(logits, [1.0], [1.0], [draw]).ids == [300 if draw < 0.5 else 511]


def test_rows_keep_their_own_settings_and_ignore_their_neighbours() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 600).to(torch.bfloat16)
    heat, mass, draws = [0.0, 1.0, 1.0, 2.0], [1.0, 1.0, 0.1, 0.9], [0.9, 0.9, 0.9, 0.1]
    both = choose(logits, heat, mass, draws)
    alone = [choose(logits[i : i + 1], heat[i : i + 1], mass[i : i + 1], draws[i : i + 1]) for i in range(4)]
    assert both.ids == [it.ids[0] for it in alone]
    assert both.ids[0] == int(logits[0].float().argmax())
    wanted = torch.log_softmax(logits.float(), -1)[range(4), both.ids]
    assert both.logprobs == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.parametrize("mass", [0.0, 0.2, 0.9, 0.999])
@pytest.mark.parametrize("heat", [0.3, 30.0])
def test_top_p_is_the_smallest_set_however_flat_the_distribution(mass: float, heat: float) -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 3000)
    probabilities, order = torch.softmax(logits / heat, -1)[0].sort(descending=True)
    size = max(1, int((probabilities.cumsum(0) < mass).sum()) + 1)
    allowed = set(order[: size + 1].tolist())  # one more, for rounding at the edge
    drawn = {choose(logits, [heat], [mass], [draw / 500]).ids[0] for draw in range(500)}
    assert drawn <= allowed
    if size < 20:
        assert drawn >= set(order[: size - 1].tolist()), "nothing likely is left out"


@pytest.mark.parametrize("heat", [1e-300, 1e-45, 9e-5])
def test_a_temperature_that_is_next_to_nothing_is_greedy(heat: float) -> None:
    torch.manual_seed(2)
    logits = torch.randn(2, 400) * 5
    found = choose(logits, [heat, heat], [1.0, 0.5], [0.2, 0.99])
    assert found.ids == logits.argmax(dim=-1).tolist()
    assert all(value == value for value in found.logprobs), "no NaN"
