"""The TensorFlow examples run on two ranks, learn, and end with the same weights on both."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..frameworks.support.launch import launcher, run

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_keras_fit(tmp_path):
    out = tmp_path / "out.json"
    run([*launcher("horovodrun", 2), str(EXAMPLES / "keras_mnist.py"), "--epochs", "2", "--json", str(out)])
    (result,) = json.loads(out.read_text())
    assert result["ranks_agree"] and result["ranks"] == 2
    assert result["accuracy"] > 60
    assert result["bytes_per_step"] < 3000  # dense: 118,952


def test_plain_horovod_drifts_apart(tmp_path):
    out = tmp_path / "out.json"
    run([*launcher("horovodrun", 2), str(EXAMPLES / "keras_mnist.py"), "--plain-horovod", "--epochs", "1", "--json", str(out)])
    assert not json.loads(out.read_text())[0]["ranks_agree"]


def test_custom_loop():
    said = run([*launcher("horovodrun", 2), str(EXAMPLES / "tf_loop.py"), "--epochs", "3"])
    accuracies = [float(text) for text in re.findall(r"accuracy ([\d.]+)%", said)]
    assert len(accuracies) == 3 and accuracies[-1] > 70
