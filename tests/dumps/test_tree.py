"""Stage files: described as they are written, whole or by slices."""

import math
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from small_dumps import write

from qwenref.dumps.aprt import read_aprt
from qwenref.dumps.layout import LAYOUTS
from qwenref.dumps.manifest import StageFile
from qwenref.dumps.tree import StageWriter
from qwenref.stages import BY_NAME


def test_a_stage_is_described_as_it_is_written(out: Path) -> None:
    out.mkdir()
    values = np.arange(2 * 3 * 5, dtype=np.float64).reshape(2, 3, 5)  # T N H
    file, rms, nonfinite = write(out, "q_post_rope", values, layer=7)
    content = (out / "layer-7" / "q_post_rope.bin").read_bytes()
    assert file == StageFile(
        stage="q_post_rope",
        layer=7,
        file="layer-7/q_post_rope.bin",
        shape=[2, 3, 5],
        axes="T N H",
        fingerprint=f"blake3:{blake3(content).hexdigest()}",
    )
    assert read_aprt(out / file.file).layer == 7
    assert read_aprt(out / file.file).values.tolist() == list(range(30))
    assert rms == pytest.approx(math.sqrt(sum(i * i for i in range(30)) / 30), rel=1e-15)
    assert nonfinite == 0


def test_a_stage_in_another_layout_has_that_shape_and_order(out: Path) -> None:
    out.mkdir()
    values = np.arange(2 * 3 * 5, dtype=np.float32).reshape(2, 3, 5)
    file, _, _ = write(out, "q_post_rope", values, layout="hf")
    assert (file.shape, file.axes) == ([3, 2, 5], "N T H")
    expected = [15 * t + 5 * n + h for n in range(3) for t in range(2) for h in range(5)]
    assert read_aprt(out / file.file).values.tolist() == expected


def test_a_stage_written_by_slices_is_the_stage_written_whole(tmp_path: Path) -> None:
    scores = np.arange(1, 1 + 2 * 3 * 3, dtype=np.float32).reshape(2, 3, 3)
    for name in ("whole", "slices"):
        (tmp_path / name).mkdir()
    whole = write(tmp_path / "whole", "attn_scores", scores)
    row, sizes = BY_NAME["attn_scores"], {"N": 2, "T": 3, "S": 3}
    with StageWriter(tmp_path / "slices", 0, row, sizes, LAYOUTS["apr"]) as writer:
        writer.write(scores[:, 2:], 2)
        writer.write(scores[:, :2])
        slices = writer.finish()
    assert slices.file == whole.file
    assert slices.rms == pytest.approx(whole.rms, rel=1e-15)
    assert read_aprt(tmp_path / "slices" / whole.file.file).values.tolist() == [
        *(1, 0, 0, 4, 5, 0, 7, 8, 9),
        *(10, 0, 0, 13, 14, 0, 16, 17, 18),
    ]


def test_the_rms_and_the_nonfinite_count_are_of_what_the_file_holds(out: Path) -> None:
    out.mkdir()
    scores = np.array([[[3, np.nan, np.inf], [4, -np.inf, -np.inf], [0, 0, 0]]])
    apr = write(out, "attn_scores", scores)
    assert (apr.rms, apr.nonfinite) == (np.inf, 1)  # above the diagonal are zeros
    hf = write(out, "attn_scores", scores, layer=1, layout="hf")
    assert math.isnan(hf.rms)
    assert hf.nonfinite == 4
    scores[0, 1:] = 0
    fine = write(out, "attn_scores", scores, layer=2)
    assert (fine.rms, fine.nonfinite) == (1.0, 0)  # 3 in nine cells


def test_a_value_beyond_float32_becomes_infinite_and_is_counted(out: Path) -> None:
    out.mkdir()
    _, rms, nonfinite = write(out, "attn_norm", np.array([[1e39, -1e300, 3e38]]))
    assert read_aprt(out / "layer-0" / "attn_norm.bin").values.tolist() == [
        np.inf,
        -np.inf,
        float(np.float32(3e38)),
    ]
    assert (rms, nonfinite) == (np.inf, 2)


def test_the_rms_of_large_values_does_not_overflow(out: Path) -> None:
    out.mkdir()
    assert write(out, "attn_norm", np.full((2, 2), 3e38)).rms == float(np.float32(3e38))


def test_a_stage_is_never_written_twice(out: Path) -> None:
    out.mkdir()
    write(out, "attn_norm", np.ones((1, 2)))
    with pytest.raises(FileExistsError, match=r"attn_norm\.bin"):
        write(out, "attn_norm", np.zeros((1, 2)))
    assert read_aprt(out / "layer-0" / "attn_norm.bin").values.tolist() == [1, 1]


def test_an_unfinished_stage_is_an_error(out: Path) -> None:
    out.mkdir()
    row, sizes = BY_NAME["attn_norm"], {"T": 3, "D": 2}
    with StageWriter(out, 0, row, sizes, LAYOUTS["apr"]) as writer:
        writer.write(np.ones((2, 2)))
        with pytest.raises(ValueError, match="not each of 6 values"):
            writer.finish()
