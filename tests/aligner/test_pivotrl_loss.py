"""The actor's loss on NVIDIA's own model, in every layout, against the reference backend's (`golden.json`)."""

import pytest
import tiny_aligner
from conftest import Run

LAYOUTS = {
    "one rank": (1, 1, 1, 2, False),
    "one rank, one micro-batch, KL": (1, 1, 1, 8, True),
    "TP=2": (2, 1, 1, 4, False),
    "PP=2": (1, 2, 1, 2, False),
    "DP=2, KL": (1, 1, 2, 2, True),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_log_probs_loss_and_gradient_are_the_reference_backends(run: Run, name: str) -> None:
    tp, pp, dp, mbs, kl = LAYOUTS[name]
    golden = tiny_aligner.golden()
    wanted = golden["kl" if kl else "clip"]
    for found in run("loss", tp * pp * dp, tp=tp, pp=pp, dp=dp, mbs=mbs, kl=kl):
        for row, expected in zip(found["log_probs"], golden["log_probs"], strict=True):
            assert row == pytest.approx(expected, abs=5e-6)
        assert found["loss"] == pytest.approx(wanted["loss"], abs=2e-6)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=2e-5)
        for metric in ("ratio", "clip_share", "policy_kl", *(["kl"] if kl else [])):
            assert found["metrics"][metric] == pytest.approx(wanted[metric], abs=2e-6), metric
