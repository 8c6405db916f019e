"""Bars say what stands behind them without asking at every row."""

from nemo_pivotrl.components.progress import progress


def test_a_bar_asks_what_it_shows_when_it_is_drawn_and_not_at_every_row() -> None:
    asked: list[int] = []

    def shown() -> dict[str, str]:
        asked.append(1)
        return {"rollouts": "1,234", "failed": "2"}

    with progress(20_000, 0, "profile", "cand") as bar:
        bar.shown = shown
        for _ in range(20_000):
            bar.update(1)
        assert len(asked) < 200
        assert str(bar).endswith("rollouts=1,234, failed=2]") and "20000/20000" in str(bar)
