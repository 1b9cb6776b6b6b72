"""A real client: a SegFormer trains the same with our loss as with its built-in loss."""

from __future__ import annotations

import json

import pytest
import torch

from ial_cuda import backends

pytest.importorskip("transformers")
segformer = pytest.importorskip("examples.segformer", reason="needs ial_cuda[bench]")

pytestmark = pytest.mark.skipif(
    backends.get("cpu").missing is not None, reason=f"cpu: {backends.get('cpu').missing}"
)

SMALL = dict(
    depths=[1] * 4, hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=16
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    config = segformer.SegformerConfig
    monkeypatch.setattr(segformer, "SegformerConfig", lambda **options: config(**SMALL, **options))
    monkeypatch.setattr(segformer, "SETTINGS", {"tiny": segformer.Setting(19, (64, 96))})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_losses_and_gradients(dtype):
    setting = segformer.Setting(19, (64, 96), dtype)
    trainings = [segformer.Training(loss, setting) for loss, _ in segformer.LOSSES.values()]
    start = trainings[0].network.decode_head.classifier.weight.clone()
    differences = segformer.train_together(trainings, setting)
    assert len(differences) == 3
    for difference in differences:
        assert 0 < difference.built_in < 10
        assert difference.is_rounding, difference
        assert difference.gradient > 0, "two computations, not one"
    assert not torch.equal(start, trainings[0].network.decode_head.classifier.weight), "it trains"


def test_a_tiny_run(capsys, tmp_path):
    assert segformer.main(["--rounds", "2", "--output", str(tmp_path)]) == 0
    (setting,) = json.loads((tmp_path / "segformer.json").read_text())["settings"]
    rows = {row["name"]: row for row in setting["rows"]}
    assert set(rows) == {f"{what}, {loss}" for what in ("step", "alone") for loss in segformer.LOSSES}
    fine = 19 * 64 * 96 * 4 / 2**20
    assert rows["alone, built-in loss"]["extra_mib"] > 2 * fine > 8 * rows["alone, ial_cuda"]["extra_mib"]
    shown = capsys.readouterr().out
    assert "share %" in shown and str(setting["share_percent"]["ial_cuda"]) in shown


def test_different_trainings_are_not_timed(monkeypatch, capsys, tmp_path):
    def wrong(network, images, labels):
        return 1.001 * segformer.built_in(network, images, labels)

    monkeypatch.setitem(segformer.LOSSES, segformer.OURS, (wrong, segformer.built_in_alone))
    assert segformer.main(["--output", str(tmp_path)]) == 1
    assert "differ by more than rounding: not timed" in capsys.readouterr().out
    assert not (tmp_path / "segformer.json").exists()
