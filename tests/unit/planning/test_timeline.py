from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_mimo.observe.timeline import draw_timeline
from lightning_mimo.planning.pricing import price_stages
from lightning_mimo.planning.step import simulate_step
from lightning_mimo.planning.timeline import traces_of
from tests.unit.planning.test_stragglers import H100, LAYOUTS, MODEL


@pytest.mark.parametrize("title", ["short", "simulated step: 17653 ms, " + "apart: images tp=8 pp=4 dp=32; " * 6])
def test_the_whole_title_is_in_the_picture(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    texts = pytest.importorskip("matplotlib.text")
    drawn: list[Any] = []
    save = figures.Figure.savefig

    def saved(figure: Any, *arguments: Any, **options: Any) -> None:
        save(figure, *arguments, **options)
        drawn.append(figure)

    monkeypatch.setattr(figures.Figure, "savefig", saved)
    candidate = LAYOUTS[1]
    simulation = simulate_step(candidate, price_stages(candidate, MODEL, H100), MODEL, H100)
    draw_timeline(traces_of(simulation), tmp_path / "step.png", title=title)
    (figure,) = drawn
    (text,) = (each for each in figure.findobj(texts.Text) if each.get_text().replace("\n", " ") == title.strip())
    box = text.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
