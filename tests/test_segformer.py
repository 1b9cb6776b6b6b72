"""A real client: a SegFormer trains the same with our loss as with its own."""

from __future__ import annotations

import pytest
import torch

from ial_cuda import _ops

pytest.importorskip("transformers")
segformer = pytest.importorskip("benchmarks.segformer", reason="needs ial_cuda[bench], and python -m pytest")

pytestmark = pytest.mark.skipif(_ops.unavailable["cpu"] is not None, reason=f"cpu: {_ops.unavailable['cpu']}")

SMALL = dict(
    num_labels=segformer.CLASSES,
    depths=[1] * 4,
    hidden_sizes=[8, 16, 24, 32],
    num_attention_heads=[1, 2, 3, 4],
    decoder_hidden_size=16,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_losses_and_gradients(dtype):
    config = segformer.SegformerConfig(**SMALL)
    trainings = [segformer.Training(config, loss, dtype) for loss, _ in segformer.LOSSES.values()]
    start = trainings[0].network.decode_head.classifier.weight.clone()
    differences = segformer.train_together(trainings, (64, 96), dtype)
    assert len(differences) == 3
    for difference in differences:
        assert 0 < difference.built_in < 10
        assert difference.is_rounding, difference
        assert difference.gradient > 0, "as if it were the same code"
    assert not torch.equal(start, trainings[0].network.decode_head.classifier.weight), "it does train"


def test_what_is_not_the_same_is_not_timed(monkeypatch, capsys, tmp_path):
    def wrong(network, images, labels):
        return 1.001 * segformer.built_in(network, images, labels)

    monkeypatch.setitem(segformer.LOSSES, segformer.OURS, (wrong, segformer.built_in_alone))
    monkeypatch.setattr(segformer, "SegformerConfig", lambda **_: config)
    monkeypatch.setattr(segformer, "SIZE", (64, 96))
    config = segformer.SegformerForSemanticSegmentation.config_class(**SMALL)
    assert segformer.main(["--output", str(tmp_path)]) == 1
    assert "not the same, and not timed" in capsys.readouterr().out
    assert not (tmp_path / "segformer.json").exists()
